"""Other resizing recipes, for Detectron2: mask classification's, and large-scale jitter.

MaskFormer (arXiv 2107.06278, section 4) and Mask2Former (arXiv 2112.01527, section 4) train on
images whose shorter side is drawn from a list, cropped, and padded to a square. Large-scale jitter
makes images much smaller and much larger than they are, in crops of one size (arXiv 2012.07177,
section 4.1, without the pasting).
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, NoOpTransform, Transform

from semask.errors import ConfigError

# Which pixel of a label map a resized one copies, in PyTorch's names: "nearest" is
# floor(i * old / new), as the published models were trained; "nearest-exact", Pillow's rule, is
# floor((i + 0.5) * old / new), which lies under the image's own pixel.
LABEL_INTERPOLATIONS = ("nearest-exact", "nearest")


class NearestLabelsTransform(T.ResizeTransform):
    """Detectron2's (Pillow's) resizing, but label maps by PyTorch's "nearest"."""

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """(h, w) of any integer type to (new_h, new_w)."""
        # float64 holds every integer label exactly, and interpolate takes no integers.
        maps = torch.from_numpy(np.ascontiguousarray(segmentation).astype(np.float64))[None, None]
        resized = F.interpolate(maps, size=(self.new_h, self.new_w), mode="nearest")
        return resized[0, 0].numpy().astype(segmentation.dtype)


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, which rounds the shorter side of a very thin image to 0 pixels; here to 1."""

    def get_transform(self, image: np.ndarray) -> Transform:
        return _not_empty(super().get_transform(image))


class ResizeScale(T.ResizeScale):
    """Detectron2's, with sides of at least 1 pixel."""

    def get_transform(self, image: np.ndarray) -> Transform:
        return _not_empty(super().get_transform(image))


def _not_empty(resize: Transform) -> Transform:
    """A resizing, not to 0 pixels."""
    if isinstance(resize, T.ResizeTransform):
        resize.new_h, resize.new_w = max(1, resize.new_h), max(1, resize.new_w)
    return resize


class ResizeShortEdge(ResizeShortestEdge):
    """Detectron2's ``ResizeShortestEdge`` with a choice of the rule for label maps."""

    def __init__(
        self,
        short_edges: Sequence[int],
        max_size: int = sys.maxsize,
        *,
        label_interpolation: str = "nearest-exact",
    ) -> None:
        """
        Args:
            short_edges: lengths of the shorter side in pixels, one of which is drawn.
            max_size: the longer side becomes no longer; the shorter one is shortened for it.
            label_interpolation: one of ``LABEL_INTERPOLATIONS``.

        Raises:
            ValueError: an argument is out of its range.
        """
        if not short_edges or min(short_edges) < 1 or max_size < 1:
            raise ValueError(
                f"the short edges and their limit must be positive numbers of pixels, not "
                f"{list(short_edges)} and {max_size}"
            )
        if label_interpolation not in LABEL_INTERPOLATIONS:
            raise ValueError(
                f"the label interpolation must be one of {', '.join(LABEL_INTERPOLATIONS)}, "
                f"not '{label_interpolation}'"
            )
        super().__init__(list(short_edges), max_size, sample_style="choice")
        self.short_edges = list(short_edges)  # which the log names
        self.label_interpolation = label_interpolation

    def get_transform(self, image: np.ndarray) -> Transform:
        resize = super().get_transform(image)
        if self.label_interpolation == "nearest":
            return NearestLabelsTransform(resize.h, resize.w, resize.new_h, resize.new_w)
        return resize


class FixedPadTransform(Transform):
    """Pad right and bottom with one value for images and one for label maps."""

    def __init__(self, h: int, w: int, new_h: int, new_w: int, pixel: int, label: int) -> None:
        """
        Args:
            h, w: size of the input.
            new_h, new_w: size of the output; what does not fit is cut off.
            pixel: value of the padding in all channels, 0..255.
            label: label of the padding.
        """
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w
        self.pixel, self.label = pixel, label

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self._padded(img, self.pixel)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._padded(segmentation, self.label)

    def _padded(self, array: np.ndarray, value: int) -> np.ndarray:
        padded = np.full((self.new_h, self.new_w, *array.shape[2:]), value, dtype=array.dtype)
        part = array[: self.new_h, : self.new_w]
        padded[: part.shape[0], : part.shape[1]] = part
        return padded

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def inverse(self) -> Transform:
        height, width = min(self.h, self.new_h), min(self.w, self.new_w)
        return CropTransform(0, 0, width, height, self.new_w, self.new_h)


class PadToFixedSize(T.Augmentation):
    """Make every image of one size: gray padding right and bottom, ignored by the labels."""

    def __init__(self, size: Sequence[int], *, pixel: int = 128, ignore_value: int = 255) -> None:
        """
        Args:
            size: (height, width) of the result in pixels; larger images are cut to it.
            pixel: value of the padding before normalisation, 0..255.
            ignore_value: label of the padding.

        Raises:
            ValueError: the size is not positive.
        """
        super().__init__()
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"the sides to pad to must be at least 1 pixel, not {list(size)}")
        self.size, self.pixel, self.ignore_value = (size[0], size[1]), pixel, ignore_value

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        if (height, width) == self.size:
            return NoOpTransform()
        return FixedPadTransform(height, width, *self.size, self.pixel, self.ignore_value)


class PadToSquare(PadToFixedSize):
    """As :class:`PadToFixedSize`, to a square."""

    def __init__(self, side: int, *, pixel: int = 128, ignore_value: int = 255) -> None:
        """
        Args:
            side: of the result in pixels; larger images are cut to it.
            pixel, ignore_value: see :class:`PadToFixedSize`.

        Raises:
            ValueError: the side is not positive.
        """
        super().__init__((side, side), pixel=pixel, ignore_value=ignore_value)
        self.side = side


class RandomWindow(T.Augmentation):
    """A random window of one size; an image that is smaller in a direction is kept whole there."""

    def __init__(self, size: Sequence[int], *, diagonal: bool = False) -> None:
        """
        Args:
            size: (height, width) of the window in pixels.
            diagonal: draw one number for both directions, so that the window's corner lies on the
                image's diagonal, as Detectron2's ``FixedSizeCrop`` does.
        """
        super().__init__()
        self.size, self.diagonal = (size[0], size[1]), diagonal

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        window = (min(height, self.size[0]), min(width, self.size[1]))
        slack = np.subtract((height, width), window)
        if self.diagonal:
            y, x = np.round(slack * np.random.uniform()).astype(int).tolist()
        else:
            y, x = np.random.randint(slack + 1).tolist()
        return CropTransform(x, y, window[1], window[0], width, height)


def build_large_scale_jitter(cfg: CfgNode, *, pad: bool = False) -> list[T.Augmentation]:
    """Resizing by a random factor, and a random crop, instead of the usual resizing.

    The image is made to fit into ``INPUT.LSJ.SIZE`` times a factor drawn uniformly from
    ``INPUT.LSJ.SCALE``; of what is larger than SIZE then, a window of SIZE is kept, which
    ``INPUT.LSJ.DIAGONAL_CROPS`` places.

    Args:
        cfg: with ``INPUT.LSJ``.
        pad: smaller images become SIZE with gray padding that no label has. Else they stay smaller:
            the batch is padded as always, and the padding counts in no loss.

    Raises:
        ConfigError: a value cannot be used.
    """
    scale, size = list(cfg.INPUT.LSJ.SCALE), list(cfg.INPUT.LSJ.SIZE)
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ConfigError(
            f"INPUT.LSJ.SCALE is {scale}; set two factors greater than 0, the smaller first."
        )
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(f"INPUT.LSJ.SIZE is {size}; set a height and a width in pixels.")
    window = RandomWindow(size, diagonal=cfg.INPUT.LSJ.DIAGONAL_CROPS)
    steps: list[T.Augmentation] = [ResizeScale(*scale, *size), window]
    if pad:
        steps.append(PadToFixedSize(size, ignore_value=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE))
    return steps
