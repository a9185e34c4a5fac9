"""Colours of classes."""

import functools
from collections.abc import Sequence

import numpy as np

# Class colours are distinct from these: background, text and the hatching of ignored pixels.
_RESERVED = [(255, 255, 255), (0, 0, 0), (150, 150, 150)]
_FIRST = (46, 110, 186)


def class_colors(
    num_classes: int, stuff_colors: Sequence[Sequence[int]] | None = None
) -> np.ndarray:
    """The dataset's own colours, or the first K of a fixed palette if it has none.

    Args:
        num_classes: K.
        stuff_colors: metadata ``stuff_colors``: K RGB triples in 0..255, or None.

    Returns:
        (K, 3) uint8, RGB.

    Raises:
        ValueError: the dataset's colours are not K triples in 0..255.
    """
    if stuff_colors is None:
        return _distinct_colors(num_classes).copy()
    colors = np.asarray(stuff_colors)
    if colors.shape != (num_classes, 3) or colors.min() < 0 or colors.max() > 255:
        raise ValueError(
            f"stuff_colors of the metadata must be {num_classes} RGB triples in 0..255 (one "
            f"per class of stuff_classes); got an array of shape {colors.shape}."
        )
    return colors.astype(np.uint8)


@functools.lru_cache
def _distinct_colors(number: int) -> np.ndarray:
    """A palette in which each colour is as far as possible from all previous ones.

    Distances are in CIELAB, which is roughly perceptually uniform, so a few classes never get
    similar colours. The palette's first colours do not depend on its length.
    """
    levels = np.linspace(20, 250, 14).round()
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lab = _cielab(grid)
    usable = (lab[:, 0] > 40) & (lab[:, 0] < 85) & (np.hypot(lab[:, 1], lab[:, 2]) < 62)
    grid, lab = grid[usable], lab[usable]

    taken = _cielab(np.array([*_RESERVED, _FIRST], dtype=float))
    nearest = np.linalg.norm(lab[:, None] - taken[None], axis=-1).min(axis=1)
    chosen = [np.array(_FIRST, dtype=float)]
    while len(chosen) < number:
        best = int(nearest.argmax())
        chosen.append(grid[best])
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=-1))
    return np.array(chosen[:number]).reshape(-1, 3).astype(np.uint8)


def _cielab(rgb: np.ndarray) -> np.ndarray:
    """(N, 3) sRGB in 0..255 to CIELAB (D65 white)."""
    share = rgb / 255
    linear = np.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1
    )
