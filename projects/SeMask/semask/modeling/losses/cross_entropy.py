"""Per-pixel losses of SeMask-FPN (arXiv 2112.12782, section 3.4)."""

import torch.nn.functional as F
from torch import Tensor

from semask.modeling.layers.resize import resize
from semask.ops.striped_loss import pixel_losses, weighted_cross_entropy

REDUCTIONS = ("all", "valid")


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_value: int = 255,
    reduction: str = "all",
    ohem_pixels: int = 0,
    striped: bool = False,
) -> Tensor:
    """Cross entropy at the labels' resolution, in float32 or better.

    Args:
        logits: (B, K, h, w), resized bilinearly (``align_corners=False``) to the labels' size.
        target: (B, H, W) int64 in 0..K-1, or ``ignore_value``.
        reduction: what the summed loss is divided by. "all": all B * H * W pixels, the ignored
            ones included, as the published models were trained; "valid": the pixels that are not
            ignored, the more usual definition, 0 where there are none.
        ohem_pixels: online hard example mining; of the valid pixels only the ``ohem_pixels * B``
            with the largest loss count (100,000 as published). 0 = all of them do. With
            "valid", the sum is then divided by the number of pixels kept.
        striped: resize and sum a stripe of rows at a time; the same value, in little memory.

    Returns:
        A scalar.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    count = target.numel() if reduction == "all" else int((target != ignore_value).sum())
    kept = min(ohem_pixels * len(target), target.numel())
    if kept and reduction == "valid":
        count = min(count, kept)
    if striped:
        return _striped_sum(logits, target, ignore_value, kept) / max(count, 1)
    logits = resize(logits, target.shape[-2:])
    losses = F.cross_entropy(logits, target, ignore_index=ignore_value, reduction="none").flatten()
    if kept:
        # Ignored pixels have a loss of exactly 0, so they add nothing where too few are valid.
        losses = losses.topk(kept, sorted=False).values
    return losses.sum() / max(count, 1)


def _striped_sum(logits: Tensor, target: Tensor, ignore_value: int, kept: int) -> Tensor:
    """The sum of the plain form; ``kept`` = pixels of hard example mining, 0 = all."""
    weight = (target != ignore_value).to(logits.dtype)
    if kept:
        hardest = pixel_losses(logits, target, ignore_value).flatten().topk(kept, sorted=False)
        chosen = weight.new_zeros(weight.numel()).index_fill_(0, hardest.indices, 1)
        weight *= chosen.view_as(weight)
    return weighted_cross_entropy(logits, target, weight)
