"""Windows of a token map: one gather in, one gather out (arXiv 2103.14030, section 3.2).

In the paper a map is zero-padded, rolled (for shifted windows), cut into windows, and all of
that is undone behind the attention. Each of these steps only moves tokens, so all of them
together are one list of indices, made once for a size of the map.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowLayout:
    """Where each token of a batch of maps lies in their windows.

    Attributes:
        rows, cols: windows of one map.
        gather: (B * rows * cols * size**2,) int64, the token of each slot of the windows; any one
            for a slot of padding.
        scatter: (B * H * W,) int64, the slot of each token.
        padding: int64, the slots that hold no token; None where there are none.
    """

    rows: int
    cols: int
    gather: Tensor
    scatter: Tensor
    padding: Tensor | None


def window_layout(
    batch: int, height: int, width: int, size: int, shift: int, device: torch.device
) -> WindowLayout:
    """The layout of maps padded right and bottom to multiples of ``size``, rolled by ``-shift``.

    Args:
        batch, height, width: of the maps, in tokens.
        size: side of a window, in tokens.
        shift: 0 <= shift < size.
        device: of the indices.
    """
    if torch.compiler.is_compiling():  # a tracer's tensors must not outlive its run
        return _make_layout(batch, height, width, size, shift, device)
    return _cached_layout(batch, height, width, size, shift, device)


def _make_layout(
    batch: int, height: int, width: int, size: int, shift: int, device: torch.device
) -> WindowLayout:
    rows, cols = -(-height // size), -(-width // size)
    maps = torch.arange(batch, device=device)[:, None, None]
    # Forwards: where a token of the map comes to lie.
    row = (torch.arange(height, device=device)[:, None] - shift) % (rows * size)
    col = (torch.arange(width, device=device) - shift) % (cols * size)
    window = (maps * rows + row // size) * cols + col // size
    scatter = ((window * size + row % size) * size + col % size).flatten()
    # Backwards: which token a slot holds, -1 for none.
    row = (torch.arange(rows * size, device=device)[:, None] + shift) % (rows * size)
    col = (torch.arange(cols * size, device=device) + shift) % (cols * size)
    token = torch.where((row < height) & (col < width), (maps * height + row) * width + col, -1)
    gather = token.view(batch, rows, size, cols, size).transpose(2, 3).flatten()
    spare = len(gather) - len(scatter)
    if not spare:
        return WindowLayout(rows, cols, gather, scatter, None)
    padding = gather.topk(spare, largest=False, sorted=False).indices  # the slots with -1
    return WindowLayout(rows, cols, gather.clamp(min=0), scatter, padding)


@lru_cache(maxsize=64)
def _cached_layout(*shape_and_device: Any) -> WindowLayout:
    with torch.inference_mode(False):  # so that a later training may save the indices
        return _make_layout(*shape_and_device)


class _Gather(torch.autograd.Function):
    """Rows into slots. Each row is read once, so the gradient is a gather too, not a sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, fill: Tensor, layout: WindowLayout) -> Tensor:
        ctx.layout = layout
        return _gather(rows, fill, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        layout = ctx.layout
        rows = grad.index_select(0, layout.scatter)
        if layout.padding is None:
            return rows, None, None
        return rows, grad.index_select(0, layout.padding).sum(0), None


class _Scatter(torch.autograd.Function):
    """Slots back into rows; those of padding are dropped, their gradient is 0."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, layout: WindowLayout) -> Tensor:
        ctx.layout = layout
        return slots.index_select(0, layout.scatter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, grad.new_zeros(grad.shape[1]), ctx.layout), None


def _gather(rows: Tensor, fill: Tensor, layout: WindowLayout) -> Tensor:
    slots = rows.index_select(0, layout.gather)
    if layout.padding is not None:
        slots[layout.padding] = fill.to(slots.dtype)
    return slots


def to_windows(x: Tensor, size: int, shift: int = 0, *, fill: Tensor | None = None) -> Tensor:
    """Cut maps into windows.

    Args:
        x: (B, H, W, C); any H and W.
        size, shift: of the windows, see :func:`window_layout`.
        fill: (C,), what a token of the padding holds; None = zeros.

    Returns:
        (B * windows, size**2, C), the windows of a map in rows, the maps one after the other.
    """
    batch, height, width, _ = x.shape
    layout = window_layout(batch, height, width, size, shift, x.device)
    rows = x.flatten(0, 2)
    if fill is None:
        fill = x.new_zeros(x.shape[3])
    if torch.is_grad_enabled() and (x.requires_grad or fill.requires_grad):
        slots = _Gather.apply(rows, fill, layout)
    else:
        slots = _gather(rows, fill, layout)
    return slots.view(-1, size * size, x.shape[3])


def from_windows(windows: Tensor, shape: tuple[int, int, int], size: int, shift: int = 0) -> Tensor:
    """Inverse of :func:`to_windows`.

    Args:
        windows: (B * windows, size**2, C).
        shape: (B, H, W) of the maps.
        size, shift: as they were cut.

    Returns:
        (B, H, W, C).
    """
    batch, height, width = shape
    layout = window_layout(batch, height, width, size, shift, windows.device)
    slots = windows.flatten(0, 1)
    if torch.is_grad_enabled() and slots.requires_grad:
        rows = _Scatter.apply(slots, layout)
    else:
        rows = slots.index_select(0, layout.scatter)
    return rows.view(*shape, -1)
