"""Multi-scale deformable attention as a weighted sum of a table's rows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from semask.modeling.layers.deformable_attention import MultiScaleDeformableAttention, Size
from semask.modeling.layers.precision import at_least_float32
from semask.ops.tracing import evaluated


class BaggedDeformableAttention(MultiScaleDeformableAttention):
    """In evaluation, the tokens around all points of a query are summed by one ``embedding_bag``.

    Interpolating is a weighted sum, too: each point's weight is divided among the four tokens
    around it. No sampled value is stored.
    """

    def sample(
        self, value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
    ) -> Tensor:
        """See :meth:`MultiScaleDeformableAttention.sample`."""
        if not evaluated(self):
            return super().sample(value, sizes, locations, weights)
        batch, tokens, heads, width = value.shape
        queries = weights.shape[1]
        # A row of the table is the token of an image for a head.
        table = at_least_float32(value).transpose(1, 2).reshape(-1, width)
        first = torch.arange(batch * heads, device=value.device).view(batch, 1, heads, 1) * tokens
        rows, shares = [], []
        for index, (height, columns) in enumerate(sizes):
            neighbours = _neighbours(at_least_float32(locations[:, :, :, index]), (height, columns))
            for row, share in neighbours:
                rows.append(row + first)
                shares.append(share * weights[:, :, :, index])
            first = first + height * columns
        per_query = 4 * weights.shape[-2] * weights.shape[-1]
        out = F.embedding_bag(
            torch.cat(rows, dim=-1).view(-1, per_query),
            table,
            per_sample_weights=torch.cat(shares, dim=-1).to(table.dtype).view(-1, per_query),
            mode="sum",
        )
        return out.view(batch, queries, heads * width).to(value.dtype)


def _neighbours(locations: Tensor, size: Size) -> list[tuple[Tensor, Tensor]]:
    """The four tokens around points, as (number in the map, share); outside the share is 0."""
    height, width = size
    place = locations * locations.new_tensor([width, height]) - 0.5
    corner = place.floor()
    fraction = place - corner
    x, y = corner.long().unbind(-1)
    right, below = fraction.unbind(-1)
    neighbours = []
    for row, row_share in ((y, 1 - below), (y + 1, below)):
        for column, column_share in ((x, 1 - right), (x + 1, right)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            number = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            neighbours.append((number, row_share * column_share * inside))
    return neighbours
