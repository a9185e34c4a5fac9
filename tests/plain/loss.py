"""Cross entropy of full-resolution logits (arXiv 2112.12782, section 3.4)."""

import torch.nn.functional as F
from torch import Tensor


def plain_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_value: int = 255,
    reduction: str = "all",
    ohem_pixels: int = 0,
) -> Tensor:
    """Cross entropy in float32 or better.

    Args:
        logits: (B, K, h, w), resized bilinearly to the size of the target.
        target: (B, H, W) int64, classes or ``ignore_value``.
        reduction: "all" divides by all pixels, "valid" by those that have weight.
        ohem_pixels: of the valid pixels, this number times B with the largest loss have weight;
            0 = all of them.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    size = target.shape[-2:]
    logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    losses = F.cross_entropy(logits, target, ignore_index=ignore_value, reduction="none")
    weights = (target != ignore_value).to(losses.dtype)
    if ohem_pixels > 0:
        valid = target != ignore_value
        hardest = losses.detach()[valid].sort(descending=True).indices[: ohem_pixels * len(target)]
        chosen = weights.new_zeros(int(valid.sum()))
        chosen[hardest] = 1.0
        weights = weights.masked_scatter(valid, chosen)
    count = target.numel() if reduction == "all" else max(int(weights.sum()), 1)
    return (losses * weights).sum() / count
