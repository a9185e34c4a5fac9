"""Bilinear resizing of maps, the same everywhere."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from semask.utils.symbolic import surely_equal


def resize(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Bilinear; a map that has the size already is returned unchanged.

    Args:
        maps: (B, C, h, w).
        size: (H, W).
        align_corners: see ``torch.nn.functional.interpolate``.

    Returns:
        (B, C, H, W).
    """
    if surely_equal(maps.shape[-2:], size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)


def up_to_multiple(side: int, multiple: int) -> int:
    """The smallest multiple that is not below ``side``."""
    # Of positive numbers, as ONNX rounds the quotients of negative ones towards zero.
    return (side + multiple - 1) // multiple * multiple


def upsample_2x(maps: Tensor, *, align_corners: bool = False) -> Tensor:
    """(B, C, h, w) to (B, C, 2h, 2w), bilinear."""
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=align_corners)
