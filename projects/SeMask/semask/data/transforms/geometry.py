"""The geometric augmentations of the published training pipeline, for Detectron2.

In training: ``ResizeByScale`` by a random factor, ``RandomCropWithCategoryLimit``, Detectron2's
``RandomFlip``, ``PhotometricDistortion`` (its own file), ``PadToSize``. In evaluation:
``ResizeByScale`` alone. All chance comes from NumPy's global generator, as in Detectron2's own
augmentations, so Detectron2's seeding of processes and data loader workers governs it.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data.transforms import Augmentation
from fvcore.transforms.transform import CropTransform, NoOpTransform, Transform


def scaled_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect ratio within ``scale``, as the published models use it.

    Args:
        height, width: of the image, in pixels.
        scale: bounds of the (longer, shorter) side, in pixels.

    Returns:
        (height, width), at least 1 each.
    """
    factor = min(scale[0] / max(height, width), scale[1] / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


class OpenCVResizeTransform(Transform):
    """Resize with OpenCV: bilinear for images, nearest for label maps.

    Detectron2's ``ResizeTransform`` uses Pillow, whose bilinear filter is antialiased when it
    shrinks: the pixels differ from what the published models were trained on.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int) -> None:
        """
        Args:
            h, w: size of the input.
            new_h, new_w: size of the output.
        """
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        resized = cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)
        return resized if resized.ndim == img.ndim else resized[:, :, None]  # one channel

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return cv2.resize(segmentation, (self.new_w, self.new_h), interpolation=cv2.INTER_NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * np.array([self.new_w / self.w, self.new_h / self.h])

    def inverse(self) -> Transform:
        return OpenCVResizeTransform(self.new_h, self.new_w, self.h, self.w)


class ResizeByScale(Augmentation):
    """Resize, aspect ratio kept, to a target scale multiplied by a random factor."""

    def __init__(
        self,
        scale: Sequence[int],
        factors: Sequence[float] = (1.0,),
        sampling: str = "choice",
    ) -> None:
        """
        Args:
            scale: (long, short), the bounds of the longer and the shorter side in pixels. They
                are multiplied by the factor and truncated to whole pixels.
            factors: positive; the default resizes to ``scale`` itself.
            sampling: "choice" takes one of ``factors``; "range" draws uniformly between the two.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__()
        if len(scale) != 2 or not scale[0] >= scale[1] >= 1:
            raise ValueError(f"the scale must be (long, short) in pixels, not {scale}")
        if sampling not in ("choice", "range"):
            raise ValueError(f"the sampling must be 'choice' or 'range', not '{sampling}'")
        if not factors or min(factors) <= 0:
            raise ValueError(f"the scale factors must be positive numbers, not {factors}")
        if sampling == "range" and (len(factors) != 2 or factors[0] > factors[1]):
            raise ValueError(f"sampling 'range' needs two factors, low and high, not {factors}")
        self.scale = (int(scale[0]), int(scale[1]))
        self.factors = tuple(float(factor) for factor in factors)
        self.sampling = sampling

    def get_transform(self, image: np.ndarray) -> Transform:
        if self.sampling == "range":
            factor = np.random.uniform(self.factors[0], self.factors[1])
        else:
            factor = self.factors[np.random.randint(len(self.factors))]
        long, short = self.scale
        height, width = image.shape[:2]
        new_size = scaled_size(height, width, (int(long * factor), int(short * factor)))
        return OpenCVResizeTransform(height, width, *new_size)


class RandomCropWithCategoryLimit(Augmentation):
    """Crop at random, and again where one class fills nearly all of the crop.

    Up to ten places are tried until the crop has more than one class and its largest class covers
    less than the limit of its valid (not ignored) pixels; otherwise the tenth is taken.
    """

    max_draws = 10

    def __init__(
        self, size: Sequence[int], max_category_area: float = 1.0, ignore_value: int = 255
    ) -> None:
        """
        Args:
            size: (height, width) of the crop, in pixels; a smaller image gives a smaller crop.
            max_category_area: the limit, in (0, 1]; 1 always takes the first place.
            ignore_value: label of ignored pixels.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__()
        self.size = _checked_size(size)
        if not 0 < max_category_area <= 1:
            raise ValueError(f"the category limit must be in (0, 1], not {max_category_area}")
        self.max_category_area = max_category_area
        self.ignore_value = ignore_value

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None) -> Transform:
        """The crop of an image with its label map, (H, W) uint8; without one the first place."""
        height, width = image.shape[:2]
        crop_h, crop_w = min(self.size[0], height), min(self.size[1], width)
        for _ in range(self.max_draws):
            y = np.random.randint(height - crop_h + 1)
            x = np.random.randint(width - crop_w + 1)
            if self._is_varied(sem_seg, y, x, crop_h, crop_w):
                break
        return CropTransform(x, y, crop_w, crop_h, width, height)

    def _is_varied(
        self, sem_seg: np.ndarray | None, y: int, x: int, height: int, width: int
    ) -> bool:
        if self.max_category_area >= 1 or sem_seg is None:
            return True
        crop = sem_seg[y : y + height, x : x + width]
        # Twice as fast as np.bincount; in float32, which counts exactly up to 2^24 pixels.
        counts = cv2.calcHist([crop], [0], None, [256], [0, 256])
        counts[self.ignore_value] = 0
        largest, valid = int(counts.max()), int(counts.sum())
        return int(np.count_nonzero(counts)) > 1 and largest < self.max_category_area * valid


class PadTransform(Transform):
    """Pad right and bottom: images with one value per channel, label maps with one value."""

    def __init__(
        self, h: int, w: int, new_h: int, new_w: int, pixel: Sequence[float], label: int
    ) -> None:
        """
        Args:
            h, w: size of the input.
            new_h, new_w: size of the output, not smaller.
            pixel: value of each channel of the padding; the image becomes float32 for it.
            label: label of the padding.
        """
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w
        self.pixel, self.label = pixel, label

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        # Stored in planes, as the model's input is: faster to fill, and saves a copy.
        planes = np.empty((img.shape[2], self.new_h, self.new_w), dtype=np.float32)
        padded = planes.transpose(1, 2, 0)
        padded[:] = self.pixel
        padded[: self.h, : self.w] = img
        return padded

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        padded = np.full((self.new_h, self.new_w), self.label, dtype=segmentation.dtype)
        padded[: self.h, : self.w] = segmentation
        return padded

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def inverse(self) -> Transform:
        return CropTransform(0, 0, self.w, self.h, self.new_w, self.new_h)


class PadToSize(Augmentation):
    """Pad right and bottom up to a size, so that the padding is 0 in the normalised image.

    The published pipeline normalises first and pads with 0 then. Detectron2's models normalise,
    (x - mean) / std in float32, after this; padding with exactly the mean gives the same. A padded
    image is float32, one that is large enough stays as it is.
    """

    def __init__(
        self, size: Sequence[int], pixel_mean: Sequence[float], ignore_value: int = 255
    ) -> None:
        """
        Args:
            size: (height, width) in pixels.
            pixel_mean: subtracted by the model, per channel in the image's order, 0..255.
            ignore_value: label of the padding.

        Raises:
            ValueError: the size is not as described.
        """
        super().__init__()
        self.size = _checked_size(size)
        self.pixel_mean = tuple(float(value) for value in pixel_mean)
        self.ignore_value = ignore_value

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        new_h, new_w = max(height, self.size[0]), max(width, self.size[1])
        if (new_h, new_w) == (height, width):
            return NoOpTransform()
        return PadTransform(height, width, new_h, new_w, self.pixel_mean, self.ignore_value)


def _checked_size(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise ValueError(f"the crop size must be (height, width) in whole pixels, not {size}")
    return int(size[0]), int(size[1])


def contiguous(image: np.ndarray) -> np.ndarray:
    """The same values in rows without gaps; a copy only where they are not.

    Args:
        image: (H, W) or (H, W, C), of a type that OpenCV knows; possibly a crop or mirrored.
    """
    if image.strides[1] < 0:  # OpenCV mirrors many times faster than NumPy copies the mirrored.
        flipped = cv2.flip(np.ascontiguousarray(image[:, ::-1]), 1)
        return flipped if flipped.ndim == image.ndim else flipped[:, :, None]
    return np.ascontiguousarray(image)


def planes(image: np.ndarray) -> np.ndarray:
    """An image of separate channels, as networks take it; a copy where it is not stored so.

    Args:
        image: (H, W, C), of a type that OpenCV knows.

    Returns:
        (C, H, W), contiguous.
    """
    stored = image.transpose(2, 0, 1)
    if stored.flags.c_contiguous:
        return stored
    return np.stack(cv2.split(contiguous(image)))  # Twice as fast as NumPy's copy of "stored".
