"""The memory layouts of images: the same values, in the order asked for."""

from collections.abc import Callable

import numpy as np
import pytest

from semask.data.transforms.geometry import contiguous, planes

VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "whole": lambda image: image,
    "crop": lambda image: image[3:9, 2:8],
    "mirrored": lambda image: image[:, ::-1],
    "mirrored_crop": lambda image: image[3:9, 2:8][:, ::-1],
    "one_column": lambda image: image[:, 4:5][:, ::-1],
    "one_pixel": lambda image: image[4:5, 4:5][:, ::-1],
    "upside_down": lambda image: image[::-1],
    "turned_by_180": lambda image: image[::-1, ::-1],
}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 3)])
def test_contiguous(view: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> None:
    image = view(noise(*shape))
    result = contiguous(image)
    assert result.flags.c_contiguous
    assert result.dtype == np.uint8
    assert np.array_equal(result, image)
    assert (result is image) == (view is VIEWS["whole"])


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_planes(view: Callable[[np.ndarray], np.ndarray], dtype: type) -> None:
    image = view(noise(12, 10, 3).astype(dtype))
    result = planes(image)
    assert result.flags.c_contiguous
    assert result.dtype == dtype
    assert np.array_equal(result, image.transpose(2, 0, 1))


def test_planes_of_what_is_stored_so_need_no_copy() -> None:
    stored = noise(3, 12, 10)
    assert np.shares_memory(planes(stored.transpose(1, 2, 0)), stored)
