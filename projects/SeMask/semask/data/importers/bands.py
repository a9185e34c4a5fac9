"""Config keys for images with bands: the range of values, and mean and std of each band."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from semask.data.bands import ImageReader, read_values

# Number of images to read.
_SAMPLE = 32


def band_keys(paths: Sequence[Path], channels: int) -> list[str]:
    """Config keys, as KEY=VALUE, that describe the channels of images.

    Args:
        paths: at least one image; all have ``channels`` channels.
        channels: their number.

    Raises:
        DataError: an image cannot be read.
    """
    step = max(1, len(paths) // _SAMPLE)
    images = [read_values(path, channels) for path in paths[::step][:_SAMPLE]]
    keys, bounds = [], None
    if images[0].dtype != np.uint8:
        finite = [image[np.isfinite(image)] for image in images]
        low = min(float(values.min()) for values in finite if values.size)
        high = max(float(values.max()) for values in finite if values.size)
        bounds = (min(0.0, low), max(high, low + 1e-6))
        keys.append(f"INPUT.VALUE_RANGE=[{bounds[0]:g},{bounds[1]:g}]")
    reader = ImageReader(channels, bounds)
    pixels = np.concatenate([reader.scaled(image).reshape(-1, channels) for image in images])
    mean = pixels.mean(axis=0, dtype=np.float64)
    std = pixels.std(axis=0, dtype=np.float64).clip(1)
    for name, numbers in (("MEAN", mean), ("STD", std)):
        keys.append(f"MODEL.PIXEL_{name}=[{','.join(f'{number:.1f}' for number in numbers)}]")
    return keys
