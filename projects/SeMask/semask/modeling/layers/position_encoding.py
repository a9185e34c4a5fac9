"""The sine position encoding of DETR (arXiv 2005.12872, appendix A.4); it has no parameters."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sine_position_encoding(size: Sequence[int], dim: int, device: torch.device) -> Tensor:
    """Sines and cosines of the row and of the column, each scaled to a period of the whole map.

    Args:
        size: (H, W) of the map that it is added to.
        dim: channels, a multiple of 4; the first half encodes the row, the second the column.
        device: where the map is.

    Returns:
        (1, dim, H, W) float32, whatever the precision of the map.
    """
    rows, columns = (_encode(side, dim // 2, device) for side in size)
    height, width = size
    return torch.cat(
        [
            rows[:, None].expand(height, width, -1),
            columns[None].expand(height, width, -1),
        ],
        dim=-1,
    ).permute(2, 0, 1)[None]


def _encode(side: int, dim: int, device: torch.device) -> Tensor:
    """(side, dim): sine in the even and cosine in the odd channels, at falling frequencies."""
    place = torch.arange(1, side + 1, dtype=torch.float32, device=device)
    place = place / (side + 1e-6) * (2 * math.pi)
    channel = torch.arange(dim, dtype=torch.float32, device=device)
    angle = place[:, None] / 10000 ** (2 * torch.floor(channel / 2) / dim)
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1)
