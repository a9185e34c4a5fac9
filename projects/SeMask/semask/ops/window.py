"""Windows of a token map: one gather in, one gather out (arXiv 2103.14030, section 3.2).

In the paper a map is zero-padded, rolled (for shifted windows) and cut into windows, and all of
this is undone after the attention. Each step only moves tokens, so all of them together are one
list of indices, computed once for a size of the map.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from semask.modeling.backbone.windows import MASKED_LOGIT

# Tokens computed at a time, so that their intermediate values stay in a CPU's cache.
CHUNK_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """The places of n tokens in windows of size**2 slots.

    Attributes:
        size: side of a window, in tokens.
        gather: (windows * size**2,) int64, the token of each slot; n for a slot of padding.
        scatter: (n,) int64, the slot of each token.
        padding: int64, the slots that hold no token; None where there are none.
    """

    size: int
    gather: Tensor
    scatter: Tensor
    padding: Tensor | None


@dataclass(frozen=True, eq=False)
class WindowLayout(TokenOrder):
    """The order of all B * H * W tokens of a batch of maps.

    Attributes:
        shift: of the windows, in tokens.
        height, width: of one map, in tokens.
        rows, cols: windows of one map.
        windows: of all maps.
        masks: see :func:`shifted_window_masks`; None without a shift.
        mask_of_window: (windows,) int64, the index of each window's mask.
        parts: see :func:`window_parts`; by the number of tokens computed at a time.
    """

    shift: int
    height: int
    width: int
    rows: int
    cols: int
    windows: int
    masks: Tensor | None
    mask_of_window: Tensor
    parts: dict[int, Sequence["WindowPart"]] = field(default_factory=dict)


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
    kinds = torch.zeros(rows, cols, dtype=torch.int64, device=device)
    kinds[:, -1] += 1
    kinds[-1, :] += 2
    return WindowLayout(
        size=size,
        gather=gather,
        scatter=scatter,
        padding=_padding(gather, len(scatter)),
        shift=shift,
        height=height,
        width=width,
        rows=rows,
        cols=cols,
        windows=batch * rows * cols,
        masks=shifted_window_masks(size, shift).to(device) if shift else None,
        mask_of_window=kinds.flatten().repeat(batch),
    )


def shifted_window_masks(size: int, shift: int) -> Tensor:
    """Separates the tokens that are neighbours only because of the cyclic shift.

    This concerns only the last row and the last column of windows, so four masks serve a map of any
    size: of a window in neither, in the last column, in the last row, and in both.

    Args:
        size, shift: of the window, in tokens.

    Returns:
        (4, size**2, size**2): 0 where two tokens may see each other, else -100.
    """
    wrapped = torch.arange(size) >= size - shift
    inside = torch.zeros(size, dtype=torch.bool)
    masks = []
    for rows, cols in product((inside, wrapped), repeat=2):
        region = (2 * rows[:, None] + cols[None, :].long()).flatten()
        apart = region[:, None] != region[None, :]
        masks.append(torch.zeros(apart.shape).masked_fill_(apart, MASKED_LOGIT))
    return torch.stack(masks)


def _padding(gather: Tensor, tokens: int) -> Tensor | None:
    spare = len(gather) - tokens
    return gather.topk(spare, sorted=False).indices if spare else None


@lru_cache(maxsize=64)
def _cached_layout(*shape_and_device: Any) -> WindowLayout:
    with torch.inference_mode(False):  # a later training must be able to save the indices
        return _make_layout(*shape_and_device)


@dataclass(frozen=True, eq=False)
class WindowPart(TokenOrder):
    """The order of the n tokens in some of the windows, which are in no other.

    Attributes:
        windows: their range.
        places: ranges of their tokens among all: one, or two that the shift has joined.
    """

    windows: slice
    places: list[slice]

    def take(self, tokens: Tensor) -> Tensor:
        """Select these tokens (n, C) of all (B * H * W, C), if possible without a copy."""
        pieces = [tokens[place] for place in self.places]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def put(self, values: Tensor, tokens: Tensor) -> None:
        """Write values (n, C) to the places that :meth:`take` reads."""
        lengths = [place.stop - place.start for place in self.places]
        for place, piece in zip(self.places, values.split(lengths), strict=True):
            tokens[place] = piece


def window_parts(layout: WindowLayout) -> Sequence[WindowPart]:
    """All windows, a few maps or a few rows of windows at a time."""
    if CHUNK_TOKENS not in layout.parts:
        layout.parts[CHUNK_TOKENS] = _make_parts(layout, CHUNK_TOKENS)
    return layout.parts[CHUNK_TOKENS]


def map_parts(
    function: Callable[[WindowPart, Tensor], Tensor], tokens: Tensor, layout: WindowLayout
) -> Tensor:
    """Apply a function to the tokens of each part and join the results.

    Args:
        function: (part, its tokens (n, C)) to (n, C).
        tokens: (B * H * W, C).
        layout: of the windows.
    """
    out = torch.empty_like(tokens)
    for part in window_parts(layout):
        part.put(function(part, part.take(tokens)), out)
    return out


def _make_parts(layout: WindowLayout, tokens_at_once: int) -> Sequence[WindowPart]:
    parts = []
    with torch.inference_mode(False):  # see _cached_layout
        for windows, places in _bands(layout, tokens_at_once):
            slots = slice(windows.start * layout.size**2, windows.stop * layout.size**2)
            scatter = torch.cat([layout.scatter[place] for place in places]) - slots.start
            gather = torch.full_like(layout.gather[slots], len(scatter))
            gather[scatter] = torch.arange(len(scatter), device=scatter.device)
            padding = _padding(gather, len(scatter))
            parts.append(
                WindowPart(
                    size=layout.size,
                    gather=gather,
                    scatter=scatter,
                    padding=padding,
                    windows=windows,
                    places=places,
                )
            )
    return parts


def _bands(layout: WindowLayout, tokens_at_once: int) -> Iterator[tuple[slice, list[slice]]]:
    """Groups of windows with about that number of slots, and the ranges of their tokens."""
    in_map, area = layout.rows * layout.cols, layout.height * layout.width
    maps = layout.windows // in_map
    together = tokens_at_once // (in_map * layout.size**2)
    if together:
        for start in range(0, maps, together):
            stop = min(start + together, maps)
            yield slice(start * in_map, stop * in_map), [slice(start * area, stop * area)]
        return
    step = max(1, tokens_at_once // (layout.cols * layout.size**2))
    for first, start in product(range(maps), range(0, layout.rows, step)):
        stop = min(start + step, layout.rows)
        # Rolled by the shift, the last band ends with the first rows of the map.
        ends = [start * layout.size + layout.shift, stop * layout.size + layout.shift]
        pieces = [ends, [0, layout.shift]] if stop == layout.rows else [ends]
        clipped = [[min(row, layout.height) for row in piece] for piece in pieces]
        yield (
            slice(first * in_map + start * layout.cols, first * in_map + stop * layout.cols),
            [
                slice(first * area + top * layout.width, first * area + bottom * layout.width)
                for top, bottom in clipped
                if top < bottom
            ],
        )


class _Gather(torch.autograd.Function):
    """Each token is read once, so its gradient is a gather; only the padding's is a sum."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: TokenOrder) -> Tensor:
        ctx.order = order
        return tokens.index_select(0, order.gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        order = ctx.order
        tokens = grad.new_empty(len(order.scatter) + 1, grad.shape[1])
        torch.index_select(grad, 0, order.scatter, out=tokens[:-1])
        tokens[-1] = 0 if order.padding is None else grad.index_select(0, order.padding).sum(0)
        return tokens, None


class _Scatter(torch.autograd.Function):
    """Slots to tokens; slots of padding are dropped and have a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, order: TokenOrder) -> Tensor:
        ctx.order = order
        return slots.index_select(0, order.scatter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return append_zero(grad).index_select(0, ctx.order.gather), None


def append_zero(tokens: Tensor) -> Tensor:
    """(T, C) to (T + 1, C); the last token is that of the padding."""
    return torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])


def gather_windows(tokens: Tensor, order: TokenOrder) -> Tensor:
    """Cut maps into windows.

    Args:
        tokens: (n + 1, C), the tokens of the maps in rows, then one for all of the padding.
        order: of a layout or a part of it.

    Returns:
        (windows, size**2, C), the windows of a map in rows, the maps one after the other.
    """
    if torch.is_grad_enabled() and tokens.requires_grad:
        slots = _Gather.apply(tokens, order)
    else:
        slots = tokens.index_select(0, order.gather)
    return slots.view(-1, order.size**2, tokens.shape[1])


def scatter_windows(windows: Tensor, order: TokenOrder) -> Tensor:
    """Inverse of :func:`gather_windows`, without the padding: (windows, size**2, C) to (n, C)."""
    slots = windows.flatten(0, 1)
    if torch.is_grad_enabled() and slots.requires_grad:
        return _Scatter.apply(slots, order)
    return slots.index_select(0, order.scatter)
