"""Multi-scale deformable attention (arXiv 2010.04159, section 4.1, equation 3)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.utils.precision import at_least_float32

Size = tuple[int, int]  # height and width of a map, in tokens


class MultiScaleDeformableAttention(nn.Module):
    """Each query attends to a few points of several maps, around its own position.

    The query predicts the points, as offsets from its reference point, and their weights.

    Args:
        channels: C of queries and values.
        num_levels: L, the number of maps.
        num_heads: M, a divisor of C; each has points, weights and C / M channels of its own.
        num_points: P, points of each head in each map.

    Raises:
        ConfigError: the heads do not divide the channels.
    """

    def __init__(
        self, *, channels: int = 256, num_levels: int = 3, num_heads: int = 8, num_points: int = 4
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ConfigError(
                f"Deformable attention needs a number of heads that divides its {channels} "
                f"channels, got {num_heads} (MODEL.MASK_FORMER.NHEADS, "
                "MODEL.SEM_SEG_HEAD.CONVS_DIM)."
            )
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(channels, 2 * samples)
        self.attention_weights = nn.Linear(channels, samples)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.init_weights()

    def init_weights(self) -> None:
        """At the start, head m samples in direction m / M of a full turn, 1 to P tokens away.

        All points have the same weight; the projections are Xavier uniform.
        """
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None, :] * distances[:, None]
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference_points: Tensor, value: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """
        Args:
            query: (B, T, C).
            reference_points: (T, 2), x and y of each query's position, as fractions of a map.
            value: (B, S, C), the tokens of all maps, one map after the other, each in rows.
            sizes: of the L maps; their areas add up to S.

        Returns:
            (B, T, C).
        """
        batch, queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
        extents = torch.stack(
            [offsets.new_full((1,), side) for height, width in sizes for side in (width, height)]
        ).view(levels, 2)
        locations = reference_points[:, None, None, None, :] + offsets / extents[:, None, :]
        weights = self.attention_weights(query).view(batch, queries, heads, levels * points)
        weights = weights.softmax(dim=-1).view(batch, queries, heads, levels, points)
        value = self.value_proj(value).view(batch, -1, heads, value.shape[-1] // heads)
        return self.output_proj(self.sample(value, sizes, locations, weights))

    def sample(
        self, value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
    ) -> Tensor:
        """The weighted sum of each query's and head's points.

        Maps are interpolated bilinearly and are zero outside.

        Args:
            value: (B, S, M, C / M).
            sizes: of the L maps.
            locations: (B, T, M, L, P, 2), x and y as fractions of a map.
            weights: (B, T, M, L, P).

        Returns:
            (B, T, C), of the type of ``value``.
        """
        batch, queries = weights.shape[:2]
        grids = at_least_float32(2 * locations - 1).transpose(1, 2).flatten(0, 1)
        maps = at_least_float32(value).permute(0, 2, 3, 1).flatten(0, 1)
        sampled = [
            F.grid_sample(
                level.unflatten(-1, size),
                grids[:, :, index],
                mode="bilinear",
                padding_mode="zeros",
                align_corners=False,
            )
            for index, (level, size) in enumerate(
                zip(maps.split([h * w for h, w in sizes], dim=-1), sizes, strict=True)
            )
        ]
        # (B * M, C / M, T, L * P), weighted with (B * M, 1, T, L * P)
        flat_weights = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
        out = (torch.cat(sampled, dim=-1) * flat_weights).sum(dim=-1)
        return out.view(batch, -1, queries).transpose(1, 2).to(value.dtype)


def reference_points(
    sizes: Sequence[Size], dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """The centre of each token of the maps: (sum of the areas, 2), x and y in (0, 1)."""
    points = []
    for height, width in sizes:
        rows = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
        columns = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points.append(torch.stack([x.flatten(), y.flatten()], dim=-1))
    return torch.cat(points)
