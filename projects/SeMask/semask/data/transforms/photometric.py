"""The photometric distortion of the published training pipeline, for Detectron2.

It goes back to SSD (arXiv 1512.02325): brightness, contrast, saturation and hue, each with
probability one half, on 8-bit values; without the random swap of channels.
"""

import cv2
import numpy as np
from detectron2.data.transforms import Augmentation
from fvcore.transforms.transform import Transform

from semask.data.transforms.geometry import contiguous

_LEVELS = np.arange(256)
_HUE, _SATURATION = 0, 1


class PhotometricTransform(Transform):
    """Brightness, contrast, saturation and hue of an 8-bit RGB image; None leaves one out.

    After each step the values are clipped to 0..255 and truncated to 8 bits, so every step is a
    table of 256 entries.
    """

    def __init__(
        self,
        brightness: float | None = None,
        contrast: float | None = None,
        saturation: float | None = None,
        hue: int | None = None,
        contrast_first: bool = True,
    ) -> None:
        """
        Args:
            brightness: added to all channels.
            contrast: factor of all channels.
            saturation: factor of the saturation.
            hue: added to the hue, on OpenCV's circle of 180 steps.
            contrast_first: contrast comes before saturation and hue; else after them.
        """
        super().__init__()
        self.brightness, self.contrast = brightness, contrast
        self.saturation, self.hue = saturation, hue
        self.contrast_first = contrast_first

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB to the same; ``img`` itself is not written to."""
        img = contiguous(img)  # OpenCV takes no mirrored views.
        first = None if self.brightness is None else _linear_table(offset=self.brightness)
        contrast = None if self.contrast is None else _linear_table(factor=self.contrast)
        if contrast is not None and self.contrast_first:
            first = contrast if first is None else contrast[first]  # one table for both steps
        if first is not None:
            img = cv2.LUT(img, first)
        if self.saturation is not None:
            img = _through_hsv(img, _SATURATION, _linear_table(factor=self.saturation))
        if self.hue is not None:
            img = _through_hsv(img, _HUE, ((_LEVELS + self.hue) % 180).astype(np.uint8))
        if contrast is not None and not self.contrast_first:
            img = cv2.LUT(img, contrast)
        return img

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords


class PhotometricDistortion(Augmentation):
    """Change brightness, contrast, saturation and hue at random, each with probability 0.5.

    Contrast comes before or after saturation and hue, with equal chance. The values are drawn in
    the order brightness, place of the contrast, contrast, saturation, hue.
    """

    def __init__(
        self,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: int = 18,
        hue_inclusive: bool = False,
    ) -> None:
        """
        Args:
            brightness: the offset is uniform between minus and plus this.
            contrast: lower and upper bound of the uniform factor.
            saturation: lower and upper bound of the uniform factor.
            hue: the offset is a whole number from -hue to hue - 1, as the SeMask-FPN models
                were trained, on OpenCV's circle of 180 steps.
            hue_inclusive: from -hue to hue, as the mask-classification models were trained.
        """
        super().__init__()
        self.brightness, self.contrast = brightness, contrast
        self.saturation, self.hue = saturation, hue
        self.hue_inclusive = hue_inclusive

    def get_transform(self, image: np.ndarray) -> Transform:
        def chance() -> bool:
            return bool(np.random.randint(2))

        brightness = np.random.uniform(-self.brightness, self.brightness) if chance() else None
        contrast_first = chance()
        contrast = np.random.uniform(*self.contrast) if chance() else None
        saturation = np.random.uniform(*self.saturation) if chance() else None
        hue = int(np.random.randint(-self.hue, self.hue + self.hue_inclusive)) if chance() else None
        return PhotometricTransform(brightness, contrast, saturation, hue, contrast_first)


def _linear_table(factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Level * factor + offset for each 8-bit level, in float32, clipped and truncated."""
    values = _LEVELS.astype(np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(values, 0, 255).astype(np.uint8)


def _through_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    """Apply a table to the hue or the saturation of an RGB image."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, channel), table), hsv, channel)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
