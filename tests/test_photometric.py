"""Photometric distortion against an independent computation of the published steps."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

from semask.data.transforms.photometric import PhotometricDistortion, PhotometricTransform


def noise(*shape: int, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint8)


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colours of all kinds in smooth patches, like a photograph."""
    return cv2.GaussianBlur(cv2.resize(noise(5, 5, 3, seed=seed), (width, height)), (5, 5), 0)


def published_distortion(rgb: np.ndarray) -> np.ndarray:
    """The published steps, on the BGR image as there, in plain NumPy and OpenCV."""

    def convert(image: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        return np.clip(image.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    def coin() -> bool:
        return np.random.randint(2) == 1

    bgr = rgb[:, :, ::-1].copy()
    if coin():
        bgr = convert(bgr, beta=np.random.uniform(-32, 32))
    contrast_first, alpha = coin(), 1.0
    if coin():
        alpha = np.random.uniform(0.5, 1.5)
    if contrast_first:
        bgr = convert(bgr, alpha)
    if coin():
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        hsv[:, :, 1] = convert(hsv[:, :, 1], np.random.uniform(0.5, 1.5))
        bgr = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if coin():
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + np.random.randint(-18, 18)) % 180
        bgr = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if not contrast_first:
        bgr = convert(bgr, alpha)
    return bgr[:, :, ::-1]


@pytest.mark.parametrize(
    "make_image", [smooth_image, lambda height, width: noise(height, width, 3)]
)
def test_photometric_distortion_is_the_published_one(
    make_image: Callable[[int, int], np.ndarray],
) -> None:
    image = make_image(37, 41)
    original = image.copy()
    distortion = PhotometricDistortion()
    for seed in range(200):
        np.random.seed(seed)
        distorted = distortion.get_transform(image).apply_image(image)
        np.random.seed(seed)
        assert distorted.dtype == np.uint8
        assert np.array_equal(distorted, published_distortion(image))
    assert np.array_equal(image, original)


def test_ranges_and_probabilities_of_the_distortion() -> None:
    np.random.seed(0)
    distortion, image = PhotometricDistortion(), np.zeros((1, 1, 3), np.uint8)
    drawn = [distortion.get_transform(image) for _ in range(3000)]
    for name, low, high in [
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
    ]:
        values = [getattr(transform, name) for transform in drawn]
        numbers = np.array([value for value in values if value is not None])
        assert 1350 < len(numbers) < 1650
        assert low <= numbers.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < numbers.max() <= high
    hues = [transform.hue for transform in drawn if transform.hue is not None]
    assert 1350 < len(hues) < 1650
    assert set(hues) == set(range(-18, 18))
    assert 1350 < sum(transform.contrast_first for transform in drawn) < 1650


def test_single_steps_of_the_distortion() -> None:
    grey = np.full((1, 1, 3), 100, np.uint8)

    def apply(image: np.ndarray, **steps: Any) -> list[int]:
        return PhotometricTransform(**steps).apply_image(image)[0, 0].tolist()

    assert apply(grey, brightness=31.9) == [131] * 3  # truncated
    assert apply(grey + 150, brightness=31.9) == [255] * 3  # clipped
    assert apply(grey - 90, brightness=-31.9) == [0] * 3
    assert apply(grey, contrast=1.499) == [149] * 3
    assert apply(grey, saturation=1.5, hue=9) == [100] * 3  # grey has neither
    red = np.array([[[255, 0, 0]]], np.uint8)
    assert apply(red, hue=10) == [255, 85, 0]  # 20 of 360 degrees towards yellow
    assert apply(red, hue=-10) == [255, 0, 85]
    assert apply(red, saturation=0.5) == [255, 128, 128]


def test_distortion_leaves_labels_and_coordinates_alone() -> None:
    label, points = noise(3, 4), np.array([[1.0, 2.0]])
    transform = PhotometricTransform(brightness=9.0)
    assert np.array_equal(transform.apply_segmentation(label), label)
    assert np.array_equal(transform.apply_coords(points), points)


def test_distortion_of_a_mirrored_view() -> None:
    image = smooth_image(8, 9)
    transform = PhotometricTransform(brightness=9.0, saturation=0.7, hue=5)
    mirrored = transform.apply_image(image[:, ::-1])
    assert np.array_equal(mirrored, transform.apply_image(image)[:, ::-1])
