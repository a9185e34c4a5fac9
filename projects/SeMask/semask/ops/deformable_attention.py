"""Multi-scale deformable attention as a weighted sum of a table's rows, in both directions.

Interpolation is a weighted sum, too: each point's weight is divided among the four tokens around
it. So the output is a sparse matrix, with a row for each query and head, times the table of
tokens: one ``embedding_bag``, which stores no sampled values. The gradient of the table is the
transposed matrix times the output's gradient; the gradient of the weights is a product evaluated
at the matrix's entries only.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from semask.modeling.layers.deformable_attention import MultiScaleDeformableAttention, Size
from semask.ops.modes import is_tracing
from semask.utils.precision import at_least_float32

# Rows and columns of zeros around a map. Points are clamped to at most two tokens outside it, where
# all four tokens around them are zero, and so their gradients.
BEFORE, AFTER = 2, 3
# Queries at a time in the forward pass: 400 numbers for each of 8 heads of them are 50 MiB.
CHUNK_QUERIES = 4096


class BaggedDeformableAttention(MultiScaleDeformableAttention):
    """The points of a query are summed by ``embedding_bag``; no sampled values are kept."""

    def forward(
        self, query: Tensor, reference_points: Tensor, value: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """See :class:`MultiScaleDeformableAttention`."""
        if is_tracing():
            return super().forward(query, reference_points, value, sizes)
        value = self.values(value)
        starts = self.starts(reference_points, sizes)
        summed: Tensor = _SampledSum.apply(value, *self._offsets_and_logits(query), starts, sizes)
        return self.output_proj(summed.to(query.dtype))

    def values(self, tokens: Tensor) -> Tensor:
        """The projected tokens: (B, S, C) to (B, S, M, D), float32 or better."""
        return at_least_float32(self.value_proj(tokens).unflatten(-1, (self.num_heads, -1)))

    def starts(self, reference_points: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Queries' positions (T, L * P, 2), in tokens from the centre of each map's first one.

        These units save a division by the map's size and a product with it.
        """
        extents = reference_points.new_tensor([(width, height) for height, width in sizes])
        starts = reference_points[:, None] * extents - 0.5
        return at_least_float32(starts.repeat_interleave(self.num_points, 1))

    def read(self, query: Tensor, starts: Tensor, layout: "TokenTable", table: Tensor) -> Tensor:
        """The attention of some queries, without gradients: (B, n, C) to (B, n, C).

        Args:
            query: (B, n, C).
            starts: (n, L * P, 2), of these queries.
            layout, table: of the :meth:`values`.
        """
        offsets, logits = self._offsets_and_logits(query)
        summed = _sampled_sum(layout, table, offsets, _softmax(logits), starts)
        return self.output_proj(summed.to(query.dtype))

    def _offsets_and_logits(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M, L * P, 2) in tokens, and (B, T, M, L * P)."""
        shape = (*query.shape[:2], self.num_heads, self.num_levels * self.num_points)
        offsets = at_least_float32(self.sampling_offsets(query)).view(*shape, 2)
        return offsets, at_least_float32(self.attention_weights(query)).view(shape)


@dataclass(frozen=True)
class TokenTable:
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

    def zeros(self, dim: int, dtype: torch.dtype) -> Tensor:
        """A table (B, S', M, D) of zeros.

        Args:
            dim: D.
            dtype: of the tokens.
        """
        rows = sum(height * width for height, width in self.padded)
        return torch.zeros(self.batch, rows, self.heads, dim, dtype=dtype, device=self.device)

    def fill(self, tokens: Tensor) -> Tensor:
        """(B, S, M, D) to the table (B, S', M, D)."""
        table = self.zeros(tokens.shape[-1], tokens.dtype)
        for inside, level in zip(self.inside(table), self.levels(tokens), strict=True):
            inside.copy_(level)
        return table

    def take(self, table: Tensor) -> Tensor:
        """The tokens (B, S, M, D) of a table (B, S', M, D)."""
        return torch.cat([inside.flatten(1, 2) for inside in self.inside(table)], dim=1)

    def levels(self, tokens: Tensor) -> list[Tensor]:
        """Tokens (B, S, ...) as maps (B, H_l, W_l, ...)."""
        parts = tokens.split([height * width for height, width in self.sizes], dim=1)
        return [part.unflatten(1, size) for part, size in zip(parts, self.sizes, strict=True)]

    def inside(self, table: Tensor) -> list[Tensor]:
        """Views (B, H_l, W_l, M, D) of the tokens in a table."""
        parts = table.split([height * width for height, width in self.padded], dim=1)
        return [
            part.unflatten(1, size)[:, BEFORE:-AFTER, BEFORE:-AFTER]
            for part, size in zip(parts, self.padded, strict=True)
        ]

    def corners(self, offsets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The token above and to the left of each point, and how far the point is from it.

        Args:
            offsets: (B, T, M, L * P, 2), x and y in tokens of the map, from ...
            starts: (T, L * P, 2), the queries' positions in the maps.

        Returns:
            Rows of the table (B, T, M, L * P) int32; and the fractions of a token in x and in y,
            of this shape.
        """
        each = starts.shape[1] // len(self.sizes)  # points of a map
        (column, x), (line, y) = (
            self._split(offsets[..., axis] + starts[:, None, :, axis], each, axis)
            for axis in (0, 1)
        )
        firsts, rows = [], 0
        for height, width in self.padded:
            firsts += [rows + BEFORE * width + BEFORE] * each
            rows += height * width
        image = rows * torch.arange(self.batch)[:, None, None, None]
        first = (image + torch.tensor(firsts)) * self.heads + torch.arange(self.heads)[:, None]
        row = line.mul_(self._lines(each)).add_(column).mul_(self.heads)
        row += first.to(self.device, torch.int32)
        # A NaN results in an arbitrary index; the fraction stays NaN.
        row.clamp_(0, self.batch * rows * self.heads - 1)
        return row, x, y

    def _split(self, places: Tensor, each: int, axis: int) -> tuple[Tensor, Tensor]:
        """The last whole token before each place, and the fraction up to it."""
        largest = [size[1 - axis] + 1 for size in self.sizes for _ in range(each)]
        limit = places.new_tensor(largest)
        places = torch.minimum(places, limit, out=places).clamp_(min=-2)
        corner = places.floor()
        return corner.to(torch.int32), places.sub_(corner)

    def neighbours(self, row: Tensor) -> Tensor:
        """Rows of the four tokens around each point: (B, T, M, L * P) to (B, T, M, 4, L * P)."""
        right = self.heads
        down = self._lines(row.shape[-1] // len(self.sizes)) * right
        rows = row.new_empty(*row.shape[:-1], 4, row.shape[-1])
        rows[..., 0, :] = row
        for neighbour, step in ((1, right), (2, down), (3, down + right)):
            torch.add(row, step, out=rows[..., neighbour, :])
        return rows

    def shift(self, table: Tensor, neighbour: int) -> Tensor:
        """Move each row (B, S', M, D) from the token above and to the left to that neighbour."""
        maps = table.split([height * width for height, width in self.padded], dim=1)
        down, right = divmod(neighbour, 2)
        lengths = [down * width + right for _, width in self.padded]
        return torch.cat(
            [level.roll(length, dims=1) for level, length in zip(maps, lengths, strict=True)], dim=1
        )

    def _lines(self, each: int) -> Tensor:
        """Rows of the table, for a single head, from a line of the map to the next: (L * P,)."""
        widths = [width for _, width in self.padded for _ in range(each)]
        return torch.tensor(widths, dtype=torch.int32, device=self.device)


class _SampledSum(torch.autograd.Function):
    """The attention without its linear layers.

    (B, S, M, D) tokens, (B, T, M, L * P, 2) offsets, (B, T, M, L * P) logits of the weights and
    (T, L * P, 2) starts to (B, T, M * D).
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        offsets: Tensor,
        logits: Tensor,
        starts: Tensor,
        sizes: Sequence[Size],
    ) -> Tensor:
        layout = TokenTable(tokens.shape[0], tokens.shape[2], tuple(sizes), tokens.device)
        table = layout.fill(tokens)
        weights = _softmax(logits)
        out = tokens.new_empty(*logits.shape[:2], tokens.shape[2:].numel())
        for part in query_chunks(logits.shape[1]):
            out[:, part] = _sampled_sum(
                layout, table, offsets[:, part], weights[:, part], starts[part]
            )
        ctx.layout = layout
        ctx.save_for_backward(table, offsets, weights, starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, offsets, weights, starts = ctx.saved_tensors
        row, x, y = ctx.layout.corners(offsets, starts)
        grad = grad.reshape(-1, table.shape[-1])
        grad_tokens = grad_offsets = grad_logits = None
        if ctx.needs_input_grad[0]:
            shares = _shares(weights, x, y)
            grad_tokens = ctx.layout.take(_transposed_sum(row, shares, grad, table, ctx.layout))
        if any(ctx.needs_input_grad[1:3]):
            rows = ctx.layout.neighbours(row)
            products = _products(rows, grad, table.view(-1, table.shape[-1]))
            grad_offsets, grad_logits = _point_gradients(products, weights, x, y)
        return grad_tokens, grad_offsets, grad_logits, None, None  # starts and sizes


def query_chunks(number: int) -> Iterator[slice]:
    """Parts of ``number`` queries."""
    for start in range(0, number, CHUNK_QUERIES):
        yield slice(start, start + CHUNK_QUERIES)


def _sampled_sum(
    layout: TokenTable, table: Tensor, offsets: Tensor, weights: Tensor, starts: Tensor
) -> Tensor:
    """The weighted sums of the points of some queries, (B, n, M * D).

    Args:
        layout: of the table.
        table: (B, S', M, D).
        offsets: (B, n, M, L * P, 2).
        weights: (B, n, M, L * P).
        starts: (n, L * P, 2).
    """
    row, x, y = layout.corners(offsets, starts)
    rows = layout.neighbours(row).flatten(-2).flatten(0, 2)
    summed = F.embedding_bag(
        rows,
        table.view(-1, table.shape[-1]),
        per_sample_weights=_shares(weights, x, y).view(rows.shape),
        mode="sum",
    )
    return summed.view(*offsets.shape[:2], -1)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; for a dozen values ten times as fast as PyTorch's softmax."""
    exponentials = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return exponentials.div_(exponentials.sum(dim=-1, keepdim=True))


def _shares(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Weights of the four tokens around each point: (..., L * P) each to (..., 4, L * P)."""
    right = weights * x
    left = weights - right
    shares = weights.new_empty(*weights.shape[:-1], 4, weights.shape[-1])
    for column, share in ((0, left), (1, right)):
        below = torch.mul(share, y, out=shares[..., 2 + column, :])
        torch.sub(share, below, out=shares[..., column, :])
    return shares


def _transposed_sum(
    row: Tensor, shares: Tensor, grad: Tensor, table: Tensor, layout: TokenTable
) -> Tensor:
    """Gradient of the table: for each row the weighted sum of the gradients of its uses.

    Sorted by their upper left token, the points of a token are contiguous: again bags to sum, once
    for each of the four neighbours.
    """
    order = row.flatten().sort(stable=True).indices
    counts = row.flatten().bincount(minlength=table.shape[:-1].numel())
    starts = (counts.cumsum(0) - counts).to(torch.int32)
    queries = order.div(row.shape[-1], rounding_mode="floor").to(torch.int32)
    total: Tensor | None = None
    for neighbour, share in enumerate(shares.unbind(-2)):
        share = share.flatten().index_select(0, order)
        part = F.embedding_bag(queries, grad, starts, per_sample_weights=share, mode="sum")
        part = layout.shift(part.view(table.shape), neighbour)
        total = part if total is None else total.add_(part)
    assert total is not None  # there are four
    return total


def _products(rows: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """Each query's gradient times the tokens around its points, of the shape of ``rows``."""
    per_query = rows.shape[-2:].numel()
    ends = torch.arange(0, rows.numel() + 1, per_query, dtype=torch.int32, device=rows.device)
    values = grad.new_zeros(rows.numel())  # on the CPU, beta = 0 does not hide a NaN
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        entries = torch.sparse_csr_tensor(
            ends, rows.flatten(), values, (len(grad), len(table)), check_invariants=False
        )
        products = torch.sparse.sampled_addmm(entries, grad, table.t(), beta=0.0)
    return products.values().view(rows.shape)


def _point_gradients(
    products: Tensor, weights: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of offsets (..., L * P, 2) and logits (..., L * P).

    Args:
        products: (..., 4, L * P), the gradients of the four shares.
        weights, x, y: (..., L * P).
    """
    upper_left, upper_right, lower_left, lower_right = products.unbind(-2)
    upper = upper_left.lerp(upper_right, x)
    lower = lower_left.lerp(lower_right, x)
    across = (upper_right - upper_left).lerp_(lower_right - lower_left, y)
    offsets = weights.new_empty(*weights.shape, 2)
    torch.mul(across, weights, out=offsets[..., 0])
    torch.mul(lower - upper, weights, out=offsets[..., 1])
    of_weights = upper.lerp_(lower, y)
    mean = (of_weights * weights).sum(dim=-1, keepdim=True)
    return offsets, of_weights.sub_(mean).mul_(weights)
