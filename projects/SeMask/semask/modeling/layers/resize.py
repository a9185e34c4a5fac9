"""The one way in which maps are brought to another size."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, ``align_corners=False``; nothing is done where the size is right already.

    Args:
        maps: (B, C, h, w).
        size: (H, W).

    Returns:
        (B, C, H, W).
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def double(maps: Tensor) -> Tensor:
    """(B, C, h, w) to (B, C, 2h, 2w), bilinear, ``align_corners=False``."""
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
