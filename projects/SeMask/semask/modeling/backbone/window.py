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

# Tokens that evaluation takes at a time, so that what it makes of them stays in a CPU's cache.
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class WindowLayout:
    """Where each token of a batch of maps lies in their windows.

    Attributes:
        rows, cols: windows of one map.
        windows: of all maps.
        gather: (windows * size**2,) int64, the token of each slot of the windows; B * H * W for
            a slot of padding.
        scatter: (B * H * W,) int64, the slot of each token.
        padding: int64, the slots that hold no token; None where there are none.
    """

    rows: int
    cols: int
    windows: int
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
    # Backwards: which token a slot holds.
    end = len(scatter)
    row = (torch.arange(rows * size, device=device)[:, None] + shift) % (rows * size)
    col = (torch.arange(cols * size, device=device) + shift) % (cols * size)
    token = torch.where((row < height) & (col < width), (maps * height + row) * width + col, end)
    gather = token.view(batch, rows, size, cols, size).transpose(2, 3).flatten()
    spare = len(gather) - end
    padding = gather.topk(spare, sorted=False).indices if spare else None
    return WindowLayout(rows, cols, batch * rows * cols, gather, scatter, padding)


@lru_cache(maxsize=64)
def _cached_layout(*shape_and_device: Any) -> WindowLayout:
    with torch.inference_mode(False):  # so that a later training may save the indices
        return _make_layout(*shape_and_device)


class _Gather(torch.autograd.Function):
    """Each token is read once, so the gradient is a gather too, and no sum but the padding's."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: WindowLayout) -> Tensor:
        ctx.layout = layout
        return tokens.index_select(0, layout.gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        tokens = grad.new_empty(len(layout.scatter) + 1, grad.shape[1])
        torch.index_select(grad, 0, layout.scatter, out=tokens[:-1])
        tokens[-1] = 0 if layout.padding is None else grad.index_select(0, layout.padding).sum(0)
        return tokens, None


class _Scatter(torch.autograd.Function):
    """Slots back into tokens; those of padding are dropped, their gradient is 0."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, layout: WindowLayout) -> Tensor:
        ctx.layout = layout
        return slots.index_select(0, layout.scatter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return append_zero(grad).index_select(0, ctx.layout.gather), None


def append_zero(tokens: Tensor) -> Tensor:
    """(T, C) to (T + 1, C): the last one is what padding holds."""
    return torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])


def gather_windows(tokens: Tensor, layout: WindowLayout) -> Tensor:
    """Cut maps into windows.

    Args:
        tokens: (B * H * W + 1, C), the maps' tokens in rows, then one for all of the padding.
        layout: of the maps.

    Returns:
        (B * windows, size**2, C), the windows of a map in rows, the maps one after the other.
    """
    if torch.is_grad_enabled() and tokens.requires_grad:
        slots = _Gather.apply(tokens, layout)
    else:
        slots = tokens.index_select(0, layout.gather)
    return slots.view(layout.windows, -1, tokens.shape[1])


def scatter_windows(windows: Tensor, layout: WindowLayout) -> Tensor:
    """Inverse of :func:`gather_windows`: (B * windows, size**2, C) to (B * H * W, C)."""
    slots = windows.flatten(0, 1)
    if torch.is_grad_enabled() and slots.requires_grad:
        return _Scatter.apply(slots, layout)
    return slots.index_select(0, layout.scatter)
