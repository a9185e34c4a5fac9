"""The per-pixel loss of SeMask-FPN and of the semantic prior (arXiv 2112.12782, section 3.4)."""

import torch.nn.functional as F
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.layers.resize import resize
from semask.modeling.losses.divisor import Divisor

REDUCTIONS = ("all", "valid")


class SegmentationLoss(nn.Module):
    """Cross entropy at the labels' resolution, in float32 or better; it has no parameters."""

    def __init__(
        self,
        *,
        ignore_value: int = 255,
        reduction: str = "all",
        ohem_pixels: int = 0,
        align_corners: bool = False,
    ) -> None:
        """
        Args:
            ignore_value: label of pixels without a loss.
            reduction: the divisor of the summed loss. "all": all B * H * W pixels, the
                ignored ones included, as the published FPN models were trained; "valid": the
                pixels that are not ignored, the more usual definition, 0 where there are none.
            ohem_pixels: online hard example mining; of the valid pixels only the
                ``ohem_pixels * B`` with the largest loss count (100,000 as published). 0 = all of
                them do. With "valid", the sum is then divided by the number of pixels kept.
            align_corners: of the bilinear resizing to the labels' size.

        Raises:
            ConfigError: the reduction is none of these, or ``ohem_pixels`` is negative.
        """
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.LOSS_REDUCTION must be one of {', '.join(REDUCTIONS)}, "
                f"got {reduction!r}."
            )
        if ohem_pixels < 0:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.OHEM_PIXELS must be 0 (off) or more, got {ohem_pixels}."
            )
        self.ignore_value = ignore_value
        self.reduction = reduction
        self.ohem_pixels = ohem_pixels
        self.align_corners = align_corners

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (B, K, h, w), resized to the labels' size.
            target: (B, H, W) int64 in 0..K-1, or the ignore value.

        Returns:
            A scalar.
        """
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        return self.summed(logits, target) / max(*self.divisor(target))

    def summed(self, logits: Tensor, target: Tensor) -> Tensor:
        """The sum over the pixels with a loss; the logits are float32 or better."""
        logits = resize(logits, target.shape[-2:], align_corners=self.align_corners)
        losses = F.cross_entropy(logits, target, ignore_index=self.ignore_value, reduction="none")
        kept = self.kept(target)
        if kept:
            # Ignored pixels have a loss of exactly 0: they add nothing where too few are valid.
            losses = losses.flatten().topk(kept, sorted=False).values
        return losses.sum()

    def kept(self, target: Tensor) -> int:
        """Pixels of a batch that hard example mining keeps; 0 = all."""
        return min(self.ohem_pixels * len(target), target.numel())

    def divisor(self, target: Tensor) -> Divisor:
        """What the sum is divided by."""
        if self.reduction == "all":
            return Divisor(target.numel())
        count = int((target != self.ignore_value).sum())
        return Divisor(min(count, self.kept(target) or count))
