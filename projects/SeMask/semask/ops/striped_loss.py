"""Up-sampling and cross entropy in one, without logits at the labels' resolution.

The plain form keeps B * K * H * W logits, their softmax and two gradients of that size. Here a
stripe of rows is up-sampled at a time; its loss and gradient are computed and projected back to
the low resolution, and only these are kept. The values are the same: the loss is a sum over
pixels, and up-sampling is linear and separable.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from semask.modeling.losses.cross_entropy import SegmentationLoss
from semask.ops.stripes import RowResize, stripes


class StripedSegmentationLoss(SegmentationLoss):
    """Resizes the logits and sums the losses a stripe of rows at a time."""

    def summed(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`SegmentationLoss`."""
        weight = (target != self.ignore_value).to(logits.dtype)
        kept = self.kept(target)
        if kept:
            losses = pixel_losses(
                logits, target, self.ignore_value, align_corners=self.align_corners
            ).flatten()
            chosen = weight.new_zeros(weight.numel())
            chosen.index_fill_(0, losses.topk(kept, sorted=False).indices, 1)
            weight *= chosen.view_as(weight)
        return weighted_cross_entropy(logits, target, weight, align_corners=self.align_corners)


class EnlargedImages:
    """Bilinearly up-sampled maps, a stripe of rows at a time.

    Args:
        maps: (B, K, h, w).
        size: (H, W) to enlarge to.
        align_corners: see ``torch.nn.functional.interpolate``.
    """

    def __init__(self, maps: Tensor, size: tuple[int, int], *, align_corners: bool) -> None:
        self.maps = maps.permute(0, 2, 3, 1).contiguous()  # classes last: no copy in channels_last
        self._size = size
        self._resize = RowResize(maps.shape[2:], size, maps.device, align_corners=align_corners)
        self.source = self._resize.source

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each image and each of its stripes of rows."""
        height, width = self._size
        row_bytes = width * self.maps.shape[3] * self.maps.element_size()
        for image in range(len(self.maps)):
            for rows in stripes(height, row_bytes, self.maps.device):
                yield image, rows

    def enlarge(self, part: Tensor, rows: slice) -> Tensor:
        """Source rows (r, w, K) to a stripe's pixels (R * W, K)."""
        return self._resize.across(self._resize.down(part, rows)).flatten(0, 1)


def pixel_losses(
    logits: Tensor, target: Tensor, ignore_value: int, *, align_corners: bool = False
) -> Tensor:
    """Cross entropy of each pixel of enlarged logits, without a gradient.

    Args:
        logits: (B, K, h, w), float32 or float64.
        target: (B, H, W) int64 in 0..K-1, or ``ignore_value``.
        ignore_value: label of pixels whose loss is 0.
        align_corners: of the enlarging.

    Returns:
        (B, H, W), 0 where ignored.
    """
    losses = torch.empty(target.shape, dtype=logits.dtype, device=logits.device)
    with torch.no_grad():
        size = (target.shape[1], target.shape[2])
        images = EnlargedImages(logits.detach(), size, align_corners=align_corners)
        for image, rows in images:
            pixels = images.enlarge(images.maps[image, images.source(rows)], rows)
            labels = target[image, rows].flatten()
            values = F.cross_entropy(pixels, labels, ignore_index=ignore_value, reduction="none")
            losses[image, rows] = values.view(-1, target.shape[2])
    return losses


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor, *, align_corners: bool = False
) -> Tensor:
    """Sum over the pixels of weight * cross entropy of the enlarged logits.

    Args:
        logits: (B, K, h, w), float32 or float64.
        target: (B, H, W) int64; in 0..K-1 where the weight is not 0.
        weight: (B, H, W) of the logits' type.
        align_corners: of the enlarging.

    Returns:
        A scalar. Its gradient is computed in the forward pass; it has no second derivative.
    """
    loss: Tensor = _WeightedCrossEntropy.apply(logits, target, weight, align_corners)
    return loss


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor, align_corners: bool
    ) -> Tensor:
        size = (target.shape[1], target.shape[2])
        images = EnlargedImages(logits.detach(), size, align_corners=align_corners)
        gradient = torch.zeros_like(images.maps)
        total = logits.new_zeros(())
        for image, rows in images:
            labels, weights = target[image, rows].flatten(), weight[image, rows].flatten()
            labels = labels.masked_fill(weights == 0, 0)[:, None]
            source = images.source(rows)
            part = images.maps[image, source].requires_grad_(ctx.needs_input_grad[0])
            with torch.enable_grad():
                pixels = images.enlarge(part, rows)
            with torch.no_grad():
                # One exponential serves both: log(sum(exp(z))) = max(z) - log(max(softmax(z))),
                # and the gradient is softmax - one_hot.
                softmax = pixels.softmax(dim=1)
                losses = pixels.amax(dim=1) - softmax.amax(dim=1).log()
                losses -= pixels.gather(1, labels)[:, 0]
                total += torch.dot(losses, weights)
                if not ctx.needs_input_grad[0]:
                    continue
                softmax.scatter_add_(1, labels, softmax.new_full((1, 1), -1).expand_as(labels))
                softmax *= weights[:, None]
            gradient[image, source] += torch.autograd.grad(pixels, part, softmax)[0]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient.permute(0, 3, 1, 2))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None
