"""3x3 convolutions with 16 products where the definition has 36 (arXiv 1509.09308, F(2x2, 3x3)).

For tiles of 4x4 pixels d that overlap by two, and a filter g, the 2x2 outputs are

    A^T [ (G g G^T) * (B^T d B) ] A

with ``*`` element by element, summed over the input channels: 16 matrix products of (tiles, C) by
(C, O). Both transforms are sums and differences of neighbours. The gradients are the adjoints.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from semask.ops.products import batched_product

# Bytes of transformed tiles at a time: they should stay in the cache.
CHUNK_BYTES = 24 * 2**20

_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def transform_filters(weight: Tensor) -> Tensor:
    """G g G^T of each filter: (O, C, 3, 3) to (16, C, O)."""
    g = weight.new_tensor(_G)
    return torch.einsum("ai,bj,ocij->abco", g, g, weight).flatten(0, 1).contiguous()


def _transform_filters_back(grad: Tensor) -> Tensor:
    """The adjoint of ``transform_filters``: (16, C, O) to (O, C, 3, 3)."""
    g = grad.new_tensor(_G)
    return torch.einsum("ai,bj,abco->ocij", g, g, grad.unflatten(0, (4, 4)))


def convolve(x: Tensor, filters: Tensor, *, out: Tensor | None = None) -> Tensor:
    """A convolution with stride 1 and zero padding 1.

    Args:
        x: (B, H, W, C), contiguous.
        filters: (16, C, O), see :func:`transform_filters`.
        out: ``x`` itself, to overwrite it, where O = C and H and W are even; or None.

    Returns:
        (B, H, W, O).
    """
    batch, height, width, channels = x.shape
    outputs = filters.shape[2]
    down, across = -(-height // 2), -(-width // 2)
    y = x.new_empty(batch, 2 * down, 2 * across, outputs) if out is None else out
    pairs = y.view(batch, down, 2, across, 2, outputs)
    above = None  # the last row of the previous chunk, which has been overwritten
    for image, rows in _chunks(batch, down, 16 * across * (channels + outputs) * x.element_size()):
        padded = _padded(x[image], rows)
        if out is not None:
            if above is not None and rows.start:
                padded[0, 1:-1] = above
            above = x[image, 2 * rows.stop - 1].clone()
        tiles = _transform_tiles(padded, across)
        products = batched_product(tiles, filters).view(4, 4, -1, across, outputs)
        for row, line in enumerate(_add_up(*products.unbind(0))):
            a, b, c, d = line.unbind(0)
            torch.add(a + b, c, out=pairs[image, rows, row, :, 0])
            torch.sub(b - c, d, out=pairs[image, rows, row, :, 1])
    return y if y.shape[1:3] == (height, width) else y[:, :height, :width].contiguous()


def filter_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the filters of :func:`convolve`, before their transform.

    Args:
        x: (B, H, W, C), contiguous.
        grad: (B, H, W, O), of the output.

    Returns:
        (O, C, 3, 3).
    """
    batch, height, width, channels = x.shape
    outputs = grad.shape[3]
    down, across = -(-height // 2), -(-width // 2)
    if (2 * down, 2 * across) != (height, width):
        grad = F.pad(grad, (0, 0, 0, 2 * across - width, 0, 2 * down - height))
    pixels = grad.reshape(batch, down, 2, across, 2, outputs)
    total = x.new_zeros(16, channels, outputs)
    for image, rows in _chunks(batch, down, 16 * across * (channels + outputs) * x.element_size()):
        tiles = _transform_tiles(_padded(x[image], rows), across)
        spread = x.new_empty(4, 4, rows.stop - rows.start, across, outputs)
        part = pixels[image, rows]
        for row, line in enumerate(_add_up_back(part[:, 0], part[:, 1])):
            a, b = line[:, :, 0], line[:, :, 1]
            spread[row, 0] = a
            torch.add(a, b, out=spread[row, 1])
            torch.sub(a, b, out=spread[row, 2])
            torch.neg(b, out=spread[row, 3])
        total += batched_product(tiles.transpose(1, 2), spread.view(16, -1, outputs))
    return _transform_filters_back(total)


def _chunks(batch: int, rows: int, row_bytes: int) -> Iterator[tuple[int, slice]]:
    step = max(1, CHUNK_BYTES // row_bytes)
    for image in range(batch):
        for start in range(0, rows, step):
            yield image, slice(start, min(start + step, rows))


def _padded(x: Tensor, rows: slice) -> Tensor:
    """The pixels of some rows of tiles of a map (H, W, C) that is zero-padded."""
    width = x.shape[1]
    top, bottom = 2 * rows.start - 1, 2 * rows.stop + 1
    part = x[max(top, 0) : bottom]
    above = max(-top, 0)
    below = bottom - top - above - len(part)
    return F.pad(part, (0, 0, 1, 1 + width % 2, above, below))


def _transform_tiles(padded: Tensor, across: int) -> Tensor:
    """B^T d B of each tile: (2 n + 2, 2 across + 2, C) to (16, n * across, C)."""
    down, channels = padded.shape[0] // 2 - 1, padded.shape[2]
    tiles = padded.new_empty(4, 4, down, across, channels)
    rows = [padded[i : i + 2 * down - 1 : 2] for i in range(4)]
    lines = (rows[0] - rows[2], rows[1] + rows[2], rows[2] - rows[1], rows[1] - rows[3])
    for line, out in zip(lines, tiles, strict=True):
        a, b, c, d = (line[:, j : j + 2 * across - 1 : 2] for j in range(4))
        torch.sub(a, c, out=out[0])
        torch.add(b, c, out=out[1])
        torch.sub(c, b, out=out[2])
        torch.sub(b, d, out=out[3])
    return tiles.view(16, -1, channels)


def _add_up(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """A^T along one direction: four values to two."""
    return (a + b).add_(c), (b - c).sub_(d)


def _add_up_back(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of ``_add_up``: two values to four."""
    return a, a + b, a - b, -b


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, transform_filters(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        by_input, by_weight = ctx.needs_input_grad
        mirrored = weight.flip(2, 3).transpose(0, 1)  # the adjoint of a convolution is one as well
        return (
            convolve(grad, transform_filters(mirrored)) if by_input else None,
            filter_gradient(x, grad) if by_weight else None,
        )


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(x, weight, padding=1)`` for 3x3 filters, differentiable.

    Args:
        x: (B, C, H, W); best in channels_last.
        weight: (O, C, 3, 3).

    Returns:
        (B, O, H, W), in channels_last.
    """
    y: Tensor = _Convolution.apply(x.permute(0, 2, 3, 1).contiguous(), weight)
    return y.permute(0, 3, 1, 2)
