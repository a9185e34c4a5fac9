"""The training data pipeline, written plainly with Pillow, NumPy and, where fixed, OpenCV."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image


def convert(image: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
    """alpha * image + beta in float32, clipped and truncated to 8 bits."""
    changed = image.astype(np.float32) * np.float32(alpha) + np.float32(beta)
    return np.clip(changed, 0, 255).astype(np.uint8)


class PlainPipeline:
    """Read, resize, crop, flip, distort, pad, to tensors (arXiv 2112.12782, section 4).

    Random numbers are drawn from NumPy's global generator in the project's order, so that both
    give the same images from the same seed.

    Args:
        scale: (long, short) in pixels.
        factors: what the scale is multiplied by; one of them, or with ``sampling`` "range" a number
            between the two.
        crop: (height, width).
        max_category_area: limit of the largest class's share of the crop; 1 = none.
        ignore_value: of the label map.
        pixel_mean: value of the padding.
    """

    def __init__(
        self,
        *,
        scale: Sequence[int],
        factors: Sequence[float],
        sampling: str,
        crop: Sequence[int],
        max_category_area: float = 1.0,
        ignore_value: int = 255,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
    ) -> None:
        self.scale, self.factors, self.sampling = scale, factors, sampling
        self.crop, self.max_category_area = crop, max_category_area
        self.ignore_value, self.pixel_mean = ignore_value, pixel_mean

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """{"file_name", "sem_seg_file_name"} to "image" (3, H, W) and "sem_seg" (H, W)."""
        image = np.array(Image.open(record["file_name"]).convert("RGB"))
        label = np.array(Image.open(record["sem_seg_file_name"]))
        image, label = self.resized(image, label)
        image, label = self.cropped(image, label)
        if np.random.uniform(0, 1.0) < 0.5:
            image, label = image[:, ::-1].copy(), label[:, ::-1].copy()
        image = plain_distortion(image, largest_hue=17)
        image, label = self.padded(image, label)
        return {
            **record,
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "sem_seg": torch.from_numpy(label.astype(np.int64)),
        }

    def resized(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.sampling == "range":
            factor = np.random.uniform(self.factors[0], self.factors[1])
        else:
            factor = self.factors[np.random.randint(len(self.factors))]
        long, short = (int(side * factor) for side in self.scale)
        height, width = image.shape[:2]
        ratio = min(long / max(height, width), short / min(height, width))
        size = (int(width * ratio + 0.5), int(height * ratio + 0.5))
        return (
            cv2.resize(image, size, interpolation=cv2.INTER_LINEAR),
            cv2.resize(label, size, interpolation=cv2.INTER_NEAREST),
        )

    def cropped(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = min(self.crop[0], label.shape[0]), min(self.crop[1], label.shape[1])
        for _ in range(10):
            top = np.random.randint(label.shape[0] - height + 1)
            left = np.random.randint(label.shape[1] - width + 1)
            part = label[top : top + height, left : left + width]
            if self.max_category_area >= 1:
                break
            classes, counts = np.unique(part, return_counts=True)
            counts = counts[classes != self.ignore_value]
            if len(counts) > 1 and counts.max() < self.max_category_area * counts.sum():
                break
        return image[top : top + height, left : left + width], part

    def padded(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = label.shape
        bottom, right = max(0, self.crop[0] - height), max(0, self.crop[1] - width)
        if bottom == right == 0:
            return image, label
        padded = np.tile(np.array(self.pixel_mean, np.float32), (height + bottom, width + right, 1))
        padded[:height, :width] = image
        label = np.pad(label, ((0, bottom), (0, right)), constant_values=self.ignore_value)
        return padded, label


def plain_distortion(image: np.ndarray, *, largest_hue: int) -> np.ndarray:
    """Brightness, contrast, saturation and a hue of -18 to ``largest_hue`` of an RGB image."""
    if np.random.randint(2):
        image = convert(image, beta=np.random.uniform(-32, 32))
    contrast_first = np.random.randint(2)
    contrast = np.random.uniform(0.5, 1.5) if np.random.randint(2) else None
    if contrast is not None and contrast_first:
        image = convert(image, alpha=contrast)
    if np.random.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 1] = convert(hsv[:, :, 1], alpha=np.random.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if np.random.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + np.random.randint(-18, largest_hue + 1)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if contrast is not None and not contrast_first:
        image = convert(image, alpha=contrast)
    return image


def plain_square(
    image: Image.Image,
    label: np.ndarray,
    *,
    offset: float,
    outside: int,
    crop: tuple[int, int] = (32, 32),
    side: int = 32,
    distorted: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The mappers of masks, after ``np.random.seed``: resized, cropped, flipped, padded.

    Args:
        image: RGB.
        label: (H, W), of the image's size.
        offset: of the place in a pixel that its label is taken from, 0 or 0.5.
        outside: the label of the padding.
        crop: height and width, at most.
        side: of the square after padding; 0 = not padded.
        distorted: with :func:`plain_distortion`.

    Returns:
        (side, side, 3) pixels and (side, side) labels.
    """
    height, width = label.shape
    short = int(np.random.choice([20, 30, 44]))
    factor = min(short / min(height, width), 60 / max(height, width))
    new_h, new_w = int(height * factor + 0.5), int(width * factor + 0.5)
    pixels = np.asarray(image.resize((new_w, new_h), Image.Resampling.BILINEAR))
    rows = [int((i + offset) * height / new_h) for i in range(new_h)]
    cols = [int((j + offset) * width / new_w) for j in range(new_w)]
    label = label[rows][:, cols]
    crop_h, crop_w = min(crop[0], new_h), min(crop[1], new_w)
    y, x = np.random.randint(new_h - crop_h + 1), np.random.randint(new_w - crop_w + 1)
    pixels, label = pixels[y : y + crop_h, x : x + crop_w], label[y : y + crop_h, x : x + crop_w]
    if distorted:
        pixels = plain_distortion(pixels, largest_hue=18)
    if np.random.uniform(0, 1.0) < 0.5:
        pixels, label = pixels[:, ::-1], label[:, ::-1]
    if not side:
        return pixels, label
    square, labels = np.full((side, side, 3), 128, np.uint8), np.full((side, side), outside)
    square[:crop_h, :crop_w], labels[:crop_h, :crop_w] = pixels, label
    return square, labels
