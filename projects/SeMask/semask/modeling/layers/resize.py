"""Bilinear resizing of maps, the same everywhere."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import SymInt, Tensor


def resize(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Bilinear; a map that has the size already is returned unchanged.

    Args:
        maps: (B, C, h, w).
        size: (H, W).
        align_corners: see ``torch.nn.functional.interpolate``.

    Returns:
        (B, C, H, W).
    """
    if _surely_equal(maps.shape[-2:], size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)


def up_to_multiple(side: int, multiple: int) -> int:
    """The smallest multiple that is not below ``side``."""
    # Of positive numbers, as ONNX rounds the quotients of negative ones towards zero.
    return (side + multiple - 1) // multiple * multiple


def is_open(*sides: int) -> bool:
    """Whether one of these is a symbol: of a graph that is exported for any size."""
    return any(isinstance(side, SymInt) for side in sides)


def _surely_equal(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes are equal; in a graph for any size, whether they always are."""
    if not is_open(*size, *other):
        return tuple(size) == tuple(other)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports SymPy

    return all(statically_known_true(a == b) for a, b in zip(size, other, strict=True))


def upsample_2x(maps: Tensor, *, align_corners: bool = False) -> Tensor:
    """(B, C, h, w) to (B, C, 2h, 2w), bilinear."""
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=align_corners)
