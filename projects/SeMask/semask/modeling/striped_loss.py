"""Up-sampling and cross entropy in one, without logits at the labels' resolution.

The plain form (``losses.py``) holds B * K * H * W logits, their softmax and two gradients of that
size. Here a stripe of rows at a time is up-sampled, its loss and gradient are computed and pulled
back to the low resolution, and only what is of that size is kept. The values are the same: the
loss is a sum over pixels, and up-sampling is linear and acts on rows and columns separately.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of up-sampled logits in a stripe: on the CPU they stay in the cache; a GPU wants few calls.
STRIPE_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


class Stripes:
    """The rows of bilinearly enlarged maps (``align_corners=False``), a stripe at a time.

    Args:
        maps: (B, K, h, w).
        size: (H, W) to enlarge to.
    """

    def __init__(self, maps: Tensor, size: tuple[int, int]) -> None:
        self.maps = maps.permute(0, 2, 3, 1).contiguous()  # classes last: no copy in channels_last
        self.height, self.width = size
        # Output row i lies at source row (i + 0.5) * h / H - 0.5, between two source rows.
        source = torch.arange(self.height, dtype=torch.float64)
        source = ((source + 0.5) * (maps.shape[2] / self.height) - 0.5).clamp_(min=0)
        upper = source.floor().long()
        lower = (upper + 1).clamp_(max=maps.shape[2] - 1)
        self._ends = torch.stack([upper, lower + 1], dim=1).tolist()
        self._upper, self._lower = upper.to(maps.device), lower.to(maps.device)
        self._fraction = (source - upper)[:, None, None].to(maps)

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each image and each of its stripes of rows."""
        row_bytes = self.width * self.maps.shape[3] * self.maps.element_size()
        budget = STRIPE_BYTES.get(self.maps.device.type, STRIPE_BYTES["cuda"])
        rows = max(1, budget // row_bytes)
        for image in range(len(self.maps)):
            for start in range(0, self.height, rows):
                yield image, slice(start, min(start + rows, self.height))

    def source(self, rows: slice) -> slice:
        """Rows of the maps that a stripe is made of."""
        return slice(self._ends[rows.start][0], self._ends[rows.stop - 1][1])

    def enlarge(self, part: Tensor, rows: slice) -> Tensor:
        """Source rows (r, w, K) to a stripe's pixels (R * W, K)."""
        first = self.source(rows).start
        upper = part.index_select(0, self._upper[rows] - first)
        lower = part.index_select(0, self._lower[rows] - first)
        lines = torch.lerp(upper, lower, self._fraction[rows])
        # Rows as a batch of images of height 1: along the columns the library's own operation.
        lines = lines.transpose(1, 2).unsqueeze(2)
        pixels = F.interpolate(lines, size=(1, self.width), mode="bilinear", align_corners=False)
        return pixels.permute(0, 2, 3, 1).flatten(0, 2)


def pixel_losses(logits: Tensor, target: Tensor, ignore_value: int) -> Tensor:
    """Cross entropy of each pixel of enlarged logits, without a gradient.

    Args:
        logits: (B, K, h, w), float32 or float64.
        target: (B, H, W) int64 in 0..K-1, or ``ignore_value``.

    Returns:
        (B, H, W), 0 where ignored.
    """
    losses = torch.empty(target.shape, dtype=logits.dtype, device=logits.device)
    with torch.no_grad():
        stripes = Stripes(logits.detach(), (target.shape[1], target.shape[2]))
        for image, rows in stripes:
            pixels = stripes.enlarge(stripes.maps[image, stripes.source(rows)], rows)
            labels = target[image, rows].flatten()
            values = F.cross_entropy(pixels, labels, ignore_index=ignore_value, reduction="none")
            losses[image, rows] = values.view(-1, target.shape[2])
    return losses


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Sum over the pixels of weight * cross entropy of the enlarged logits.

    Args:
        logits: (B, K, h, w), float32 or float64.
        target: (B, H, W) int64; in 0..K-1 where the weight is not 0.
        weight: (B, H, W) of the logits' type.

    Returns:
        A scalar. Its gradient is computed on the way, so it can be taken once, and not twice.
    """
    loss: Tensor = _WeightedCrossEntropy.apply(logits, target, weight)
    return loss


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        stripes = Stripes(logits.detach(), (target.shape[1], target.shape[2]))
        gradient = torch.zeros_like(stripes.maps)
        total = logits.new_zeros(())
        for image, rows in stripes:
            labels, weights = target[image, rows].flatten(), weight[image, rows].flatten()
            labels = labels.masked_fill(weights == 0, 0)[:, None]
            source = stripes.source(rows)
            part = stripes.maps[image, source].requires_grad_(ctx.needs_input_grad[0])
            with torch.enable_grad():
                pixels = stripes.enlarge(part, rows)
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
