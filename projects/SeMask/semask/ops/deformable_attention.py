"""Multi-scale deformable attention as a weighted sum of a table's rows, in both directions.

Interpolating is a weighted sum, too: each point's weight is divided among the four tokens around
it. So the output is a sparse matrix, with a row for each query and head, times the table of the
tokens: one ``embedding_bag``, for which no sampled value is stored. The gradient of the table is
the transposed matrix times that of the output, that of the weights a product at the matrix's
entries alone.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from semask.modeling.layers.deformable_attention import MultiScaleDeformableAttention, Size
from semask.modeling.layers.precision import at_least_float32
from semask.ops.tracing import traced

# Rows and columns of zeros around a map. Points are moved to at most two tokens beside it, so that
# all four tokens around those outside are zero, and with them their gradients.
BEFORE, AFTER = 2, 3


class BaggedDeformableAttention(MultiScaleDeformableAttention):
    """The points of a query are summed by ``embedding_bag``; nothing sampled is kept."""

    def forward(
        self, query: Tensor, reference_points: Tensor, value: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """See :class:`MultiScaleDeformableAttention`."""
        if traced():
            return super().forward(query, reference_points, value, sizes)
        batch, queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        # In tokens from the centre of a map's first one: no division by its size and back.
        extents = query.new_tensor([(width, height) for height, width in sizes])
        starts = reference_points[:, None, :] * extents - 0.5
        offsets = self.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
        places = at_least_float32(offsets + starts[:, None, :, None])
        weights = self.attention_weights(query).view(batch, queries, heads, levels * points)
        weights = at_least_float32(weights.softmax(dim=-1))
        value = self.value_proj(value)
        tokens = at_least_float32(value.unflatten(-1, (heads, -1)))
        summed: Tensor = _SampledSum.apply(tokens, places, weights.view(places.shape[:-1]), sizes)
        return self.output_proj(summed.to(value.dtype))


@dataclass(frozen=True)
class _Table:
    """The tokens of B images with zeros around each map: a row for each token and head.

    Attributes:
        batch, heads: B and M.
        sizes: (height, width) of the maps.
        device: of the tokens.
    """

    batch: int
    heads: int
    sizes: tuple[Size, ...]
    device: torch.device

    @property
    def padded(self) -> list[Size]:
        """The maps' sizes with their zeros."""
        around = BEFORE + AFTER
        return [(height + around, width + around) for height, width in self.sizes]

    def fill(self, tokens: Tensor) -> Tensor:
        """(B, S, M, D) to the table (B, S', M, D)."""
        areas = [height * width for height, width in self.padded]
        table = tokens.new_zeros(self.batch, sum(areas), *tokens.shape[2:])
        for inside, level in zip(self._inside(table), self._levels(tokens), strict=True):
            inside.copy_(level)
        return table

    def take(self, table: Tensor) -> Tensor:
        """The tokens (B, S, M, D) of a table (B, S', M, D)."""
        return torch.cat([inside.flatten(1, 2) for inside in self._inside(table)], dim=1)

    def _levels(self, tokens: Tensor) -> list[Tensor]:
        parts = tokens.split([height * width for height, width in self.sizes], dim=1)
        return [part.unflatten(1, size) for part, size in zip(parts, self.sizes, strict=True)]

    def _inside(self, table: Tensor) -> list[Tensor]:
        parts = table.split([height * width for height, width in self.padded], dim=1)
        return [
            part.unflatten(1, size)[:, BEFORE:-AFTER, BEFORE:-AFTER]
            for part, size in zip(parts, self.padded, strict=True)
        ]

    def corners(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The token above and to the left of each point, and how far the point is from it.

        Args:
            places: (B, T, M, L, P, 2), x and y in tokens of the map.

        Returns:
            Rows of the table (B, T, M, L, P) int32; fractions (B, T, M, L, P, 2).
        """
        largest = places.new_tensor([(width + 1, height + 1) for height, width in self.sizes])
        places = places.clamp(torch.full_like(largest, -2)[:, None], largest[:, None])
        corner = places.floor()
        column, line = corner.to(torch.int32).unbind(-1)
        firsts, rows = [], 0
        for height, width in self.padded:
            firsts.append(rows + BEFORE * width + BEFORE)
            rows += height * width
        image = rows * torch.arange(self.batch)[:, None, None]
        first = (image + torch.tensor(firsts)) * self.heads + torch.arange(self.heads)[:, None]
        first = first[:, None, :, :, None].to(places.device, torch.int32)
        row = (line * self._lines[:, None] + column).mul_(self.heads).add_(first)
        # No index can be made of a NaN; it stays one in the fraction.
        row.clamp_(0, self.batch * rows * self.heads - 1)
        return row, places.sub_(corner)

    @property
    def steps(self) -> Tensor:
        """From that token to it and the other three: (L, 1, 4), in rows of the table."""
        down, right = self._lines * self.heads, self.heads
        return torch.stack(
            [torch.zeros_like(down), torch.full_like(down, right), down, down + right], dim=-1
        )[:, None]

    def shift(self, table: Tensor, neighbour: int) -> Tensor:
        """Move each row (B, S', M, D) from the token above and to the left to that neighbour."""
        maps = table.split([height * width for height, width in self.padded], dim=1)
        down, right = divmod(neighbour, 2)
        lengths = [down * width + right for _, width in self.padded]
        return torch.cat(
            [level.roll(length, dims=1) for level, length in zip(maps, lengths, strict=True)], dim=1
        )

    @property
    def _lines(self) -> Tensor:
        widths = [width for _, width in self.padded]
        return torch.tensor(widths, dtype=torch.int32, device=self.device)


class _SampledSum(torch.autograd.Function):
    """(B, S, M, D), (B, T, M, L, P, 2) and (B, T, M, L, P) to (B, T, M * D)."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, places: Tensor, weights: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        layout = _Table(tokens.shape[0], tokens.shape[2], tuple(sizes), tokens.device)
        table = layout.fill(tokens)
        row, fraction = layout.corners(places)
        shares = _shares(fraction, weights)
        rows = row[..., None] + layout.steps
        out = F.embedding_bag(
            rows.view(-1, rows[0, 0, 0].numel()),
            table.view(-1, table.shape[-1]),
            per_sample_weights=shares.view(-1, rows[0, 0, 0].numel()),
            mode="sum",
        )
        ctx.layout = layout
        ctx.save_for_backward(table, places, weights)
        return out.view(*places.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        table, places, weights = ctx.saved_tensors
        row, fraction = ctx.layout.corners(places)
        grad = grad.reshape(-1, table.shape[-1])
        grad_tokens = grad_places = grad_weights = None
        if ctx.needs_input_grad[0]:
            shares = _shares(fraction, weights)
            grad_tokens = ctx.layout.take(_transposed_sum(row, shares, grad, table, ctx.layout))
        if any(ctx.needs_input_grad[1:3]):
            rows = row[..., None] + ctx.layout.steps
            values = _products(rows, grad, table.view(-1, table.shape[-1]))
            grad_places, grad_weights = _point_gradients(values, fraction, weights)
        return grad_tokens, grad_places, grad_weights, None  # sizes


def _shares(fraction: Tensor, weights: Tensor) -> Tensor:
    """Weights of the four tokens around each point: (..., 2) and (...) to (..., 4)."""
    x, y = fraction.unbind(-1)
    right = weights * x
    left = weights - right
    shares = weights.new_empty(*weights.shape, 4)
    for column, share in ((0, left), (1, right)):
        below = torch.mul(share, y, out=shares[..., 2 + column])
        torch.sub(share, below, out=shares[..., column])
    return shares


def _transposed_sum(
    row: Tensor, shares: Tensor, grad: Tensor, table: Tensor, layout: _Table
) -> Tensor:
    """Gradient of the table: what each row has been given out to, weighted and summed.

    Sorted by their upper left token, the points of a token lie side by side: again bags to sum,
    once for each of the four neighbours.
    """
    number = table.shape[:-1].numel()
    order = row.flatten().sort(stable=True).indices
    counts = row.flatten().bincount(minlength=number)
    starts = (counts.cumsum(0) - counts).to(torch.int32)
    queries = order.div(row[0, 0, 0].numel(), rounding_mode="floor").to(torch.int32)
    sorted_shares = shares.view(-1, 4).index_select(0, order).t().contiguous()
    total: Tensor | None = None
    for neighbour, share in enumerate(sorted_shares):
        part = F.embedding_bag(queries, grad, starts, per_sample_weights=share, mode="sum")
        part = layout.shift(part.view(table.shape), neighbour)
        total = part if total is None else total.add_(part)
    assert total is not None  # there are four
    return total


def _products(rows: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """Each query's gradient times the tokens around its points, of the shape of ``rows``."""
    per_query = rows[0, 0, 0].numel()
    ends = torch.arange(0, rows.numel() + 1, per_query, dtype=torch.int32, device=rows.device)
    values = grad.new_empty(rows.numel())  # overwritten, as beta is 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        entries = torch.sparse_csr_tensor(
            ends, rows.flatten(), values, (len(grad), len(table)), check_invariants=False
        )
        products = torch.sparse.sampled_addmm(entries, grad, table.t(), beta=0.0)
    return products.values().view(rows.shape)


def _point_gradients(values: Tensor, fraction: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of places (..., 2) and weights (...) from those of the four shares (..., 4)."""
    x, y = fraction.unbind(-1)
    upper_left, upper_right, lower_left, lower_right = values.unbind(-1)
    upper = upper_left.lerp(upper_right, x)
    lower = lower_left.lerp(lower_right, x)
    places = torch.empty_like(fraction)
    across = (upper_right - upper_left).lerp_(lower_right - lower_left, y)
    torch.mul(across, weights, out=places[..., 0])
    torch.mul(lower - upper, weights, out=places[..., 1])
    return places, upper.lerp_(lower, y)
