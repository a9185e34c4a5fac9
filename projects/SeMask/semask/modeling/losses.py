"""Per-pixel losses of SeMask-FPN (arXiv 2112.12782, section 3.4)."""

import torch.nn.functional as F
from torch import Tensor

from .resize import resize

REDUCTIONS = ("all", "valid")


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_value: int = 255,
    reduction: str = "all",
    ohem_pixels: int = 0,
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

    Returns:
        A scalar.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    logits = resize(logits, target.shape[-2:])
    losses = F.cross_entropy(logits, target, ignore_index=ignore_value, reduction="none").flatten()
    count = target.numel() if reduction == "all" else int((target != ignore_value).sum())
    if ohem_pixels:
        # Ignored pixels have a loss of exactly 0, so they add nothing where too few are valid.
        kept = min(ohem_pixels * len(target), losses.numel())
        losses = losses.topk(kept, sorted=False).values
        count = count if reduction == "all" else min(count, kept)
    return losses.sum() / max(count, 1)
