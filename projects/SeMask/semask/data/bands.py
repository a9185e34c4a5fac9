"""Images of any number of channels, and of values that are not 0..255.

``MODEL.PIXEL_MEAN`` has a number for each channel of the images. Three channels without
``INPUT.VALUE_RANGE`` are photographs, read as 8-bit RGB by :mod:`semask.data.reading`. Everything
else is read here: arrays in ``.npy`` files, TIFFs with bands, grey images, and files of 16 bits or
of floating-point numbers, whose values are scaled to 0..255 in float32.
"""

import importlib.util
import io
import os
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from semask.data.image_files import file_errors, opened_image
from semask.data.reading import read_image
from semask.errors import ConfigError, DataError
from semask.utils.text import pluralize

_ARRAY = ".npy"
_TIFF = (".tif", ".tiff")
# EXIF orientations whose upright width is the stored height.
_TRANSPOSED = (5, 6, 7, 8)
WITH_BANDS = (_ARRAY, *_TIFF)
"""Suffixes of the files that can have any number of channels."""


@dataclass(frozen=True)
class ImageReader:
    """How image files become arrays that augmentations and models take.

    Attributes:
        channels: C; 3 = RGB, 1 = grey.
        value_range: the values of the files that become 0 and 255; None = those of the files' type,
            0 and 255 or 0 and 65535.
        picture_bands: the channels that pictures show as red, green and blue; () = the first three,
            or the first one in grey where there are fewer.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    picture_bands: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ImageReader":
        """The reader for ``MODEL.PIXEL_MEAN``, ``INPUT.VALUE_RANGE`` and ``PICTURE_BANDS``.

        Raises:
            ConfigError: a key cannot be used.
        """
        channels = len(cfg.MODEL.PIXEL_MEAN)
        given, bands = list(cfg.INPUT.VALUE_RANGE), tuple(cfg.INPUT.PICTURE_BANDS)
        if given and not (len(given) == 2 and given[0] < given[1]):
            raise ConfigError(
                f"INPUT.VALUE_RANGE is {given}; it needs the values of the files that become 0 and "
                "255, the smaller first, such as [0, 4095] for 12 bits; [] = those of their type."
            )
        if bands and not (
            len(bands) == 3 and all(isinstance(b, int) and 0 <= b < channels for b in bands)
        ):
            raise ConfigError(
                f"INPUT.PICTURE_BANDS is {list(bands)}; it needs three numbers of channels, "
                f"0..{channels - 1}, as MODEL.PIXEL_MEAN has {pluralize(channels, 'number')}."
            )
        values = (float(given[0]), float(given[1])) if given else None
        return cls(channels, values, bands)

    @property
    def is_rgb(self) -> bool:
        """Images are 8-bit RGB, for which distorted colours are defined."""
        return self.channels == 3 and self.value_range is None

    def read(self, path: str | os.PathLike[str]) -> np.ndarray:
        """An image file.

        Returns:
            (H, W, 3) uint8, RGB, where :attr:`is_rgb`; else (H, W, C) float32, 0..255.

        Raises:
            DataError: the file is missing or damaged, has other channels, or values without a
                known range.
        """
        if self.is_rgb and not os.fspath(path).lower().endswith(_ARRAY):
            return read_image(path)
        return self.scaled(read_values(path, self.channels), path)

    def scaled(self, values: np.ndarray, path: str | os.PathLike[str] = "array") -> np.ndarray:
        """Scale an array, read from a file or elsewhere, as :meth:`read` does.

        Args:
            values: (H, W, C) of any type, or (H, W) of one channel.
            path: the file, for messages.

        Raises:
            DataError: the shape is another, or the range is not known.
        """
        values = values[:, :, None] if values.ndim == 2 else values
        if values.ndim != 3 or values.shape[2] != self.channels or not values.size:
            raise DataError(
                f"Image '{path}' has the shape {values.shape}, and an image (height, width, "
                f"{self.channels}) is needed: MODEL.PIXEL_MEAN has a number for each channel."
            )
        if self.is_rgb and values.dtype in (np.uint8, np.uint16):
            return values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)
        bounds = self.value_range or _bounds(values.dtype, path)
        scaled = (values.astype(np.float32) - np.float32(bounds[0])) * np.float32(
            255 / (bounds[1] - bounds[0])
        )
        scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255)
        return np.rint(scaled).astype(np.uint8) if self.is_rgb else scaled.astype(np.float32)

    def picture(self, image: np.ndarray) -> np.ndarray:
        """The RGB picture of an image, for drawings and reports.

        Args:
            image: (H, W, C), 0..255.

        Returns:
            (H, W, 3) uint8; the image itself where it has this form.
        """
        if self.channels == 3 and image.dtype == np.uint8 and not self.picture_bands:
            return image
        bands = self.picture_bands or ((0, 1, 2) if self.channels >= 3 else (0, 0, 0))
        shown = image[:, :, list(bands)]
        return np.rint(shown.clip(0, 255)).astype(np.uint8)

    def read_picture(self, path: str | os.PathLike[str]) -> np.ndarray:
        """The RGB picture of an image file, (H, W, 3) uint8.

        Raises:
            DataError: as of :meth:`read`.
        """
        return self.picture(self.read(path))

    def mode(self, path: str | os.PathLike[str]) -> str:
        """How a file stores its pixels, such as "6 bands of uint16"; "" = as photographs do."""
        if self.is_rgb and not os.fspath(path).lower().endswith(_ARRAY):
            return ""
        values = read_values(path, self.channels)
        return f"{pluralize(values.shape[2], 'band')} of {values.dtype}"


RGB = ImageReader()
"""The reader of photographs."""


def reader_of(mapper: Any) -> ImageReader:
    """The reader of a mapper; RGB for a mapper without one."""
    reader = getattr(mapper, "reader", RGB)
    return reader if isinstance(reader, ImageReader) else RGB


def read_values(path: str | os.PathLike[str], channels: int) -> np.ndarray:
    """An image file's values, neither scaled nor converted to RGB.

    Arrays and TIFFs may have their channels first or last; where both fit, they are last. One
    channel of a photograph is its grey value; three channels of a grey image are equal. The EXIF
    orientation is applied.

    Args:
        path: ``.npy``, TIFF, or a usual image.
        channels: the number that is needed.

    Returns:
        (H, W, C) of the file's type.

    Raises:
        DataError: the file is missing or damaged, or has other channels.
    """
    low = os.fspath(path).lower()
    orientation = 1
    if low.endswith(_ARRAY):
        with file_errors(path, "image"), PathManager.open(os.fspath(path), "rb") as file:
            values = np.load(io.BytesIO(file.read()), allow_pickle=False)
    elif low.endswith(_TIFF):
        values, orientation = _tiff(path, channels)
    else:
        values = _photograph(path, channels)
    shape = values.shape
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim == 3 and values.shape[2] != channels and values.shape[0] == channels:
        values = values.transpose(1, 2, 0)
    if channels == 3 and values.ndim == 3 and values.shape[2] == 1:
        values = np.repeat(values, 3, axis=2)
    if values.ndim != 3 or values.shape[2] != channels or not values.size:
        raise DataError(
            f"Image '{path}' has the shape {shape}, and {pluralize(channels, 'channel')} "
            "are needed: MODEL.PIXEL_MEAN has a number for each channel."
        )
    return upright(values, orientation)


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """(width, height, channels) of an array or a TIFF with any number of bands, upright.

    The smallest of the three sides is taken for the channels.

    Raises:
        DataError: the file cannot be read, or is no image.
    """
    low = os.fspath(path).lower()
    if low.endswith(_ARRAY):
        with file_errors(path, "image"), PathManager.open(os.fspath(path), "rb") as file:
            shape = np.load(io.BytesIO(file.read()), allow_pickle=False).shape
        orientation = 1
    else:
        shape, orientation = _tiff_shape(path)
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(f"Image '{path}' has the shape {shape}; it must be (height, width, C).")
    first = len(shape) == 3 and shape[0] < min(shape[1:])
    height, width = shape[1:] if first else shape[:2]
    channels = 1 if len(shape) == 2 else shape[0] if first else shape[2]
    if orientation in _TRANSPOSED:
        height, width = width, height
    return width, height, channels


def _bounds(dtype: np.dtype[Any], path: str | os.PathLike[str]) -> tuple[float, float]:
    if dtype.kind == "b":
        return 0, 1
    if dtype in (np.uint8, np.uint16):
        return 0, float(np.iinfo(dtype).max)
    raise DataError(
        f"Image '{path}' has {dtype} values, whose range is unknown.",
        "Set INPUT.VALUE_RANGE to the values that are mapped to 0 and 255, as in "
        "INPUT.VALUE_RANGE=[0,1].",
    )


def _tiff(path: str | os.PathLike[str], channels: int) -> tuple[np.ndarray, int]:
    """All samples of a TIFF, and the orientation to apply to them.

    Without tifffile, OpenCV reads what it can, and applies the orientation of TIFFs.
    """
    if importlib.util.find_spec("tifffile") is None:
        if channels not in (1, 3, 4):
            raise DataError(
                f"Image '{path}': TIFFs with bands need the library tifffile.",
                "Install it with \"pip install 'semask[bands]'\", or save arrays as .npy.",
            )
        return _decoded(path), 1
    import tifffile  # of an extra

    with (
        file_errors(path, "image"),
        PathManager.open(os.fspath(path), "rb") as file,
        tifffile.TiffFile(file) as tiff,
    ):
        values: np.ndarray = tiff.asarray()
        return values, _orientation_tag(tiff)


def _tiff_shape(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], int]:
    """The shape and the orientation that :func:`_tiff` returns, without the values."""
    if importlib.util.find_spec("tifffile") is None:
        return _decoded(path).shape, 1
    import tifffile  # of an extra

    with (
        file_errors(path, "image"),
        PathManager.open(os.fspath(path), "rb") as file,
        tifffile.TiffFile(file) as tiff,
    ):
        shape: tuple[int, ...] = tiff.series[0].shape
        return shape, _orientation_tag(tiff)


def _orientation_tag(tiff: Any) -> int:
    tag = tiff.pages[0].tags.get("Orientation")
    return 1 if tag is None else int(tag.value)


def _photograph(path: str | os.PathLike[str], channels: int) -> np.ndarray:
    """A usual image: one channel is grey, others are those of the file."""
    with opened_image(path, "image") as image:
        deep = image.format == "PNG" and image.mode in ("RGB", "RGBA") and _has_16_bits(image)
        if not deep:
            image.load()
            wide = image.mode.startswith("I")
            if channels == 1 and not wide:
                image = image.convert("L")
            elif channels == 3 and image.mode != "RGB" and not wide:
                image = image.convert("RGB")
            pixels = np.asarray(image)
            return upright(pixels if not wide else pixels.astype(np.uint16), _orientation(image))
        orientation = _orientation(image)
    values = upright(_decoded(path), orientation)
    if channels == 1:
        return np.asarray(cv2.cvtColor(values[:, :, :3].copy(), cv2.COLOR_RGB2GRAY))
    return values[:, :, :channels]


def _has_16_bits(image: Image.Image) -> bool:
    """Whether an opened colour PNG has 16 bits a channel, of which Pillow keeps eight."""
    tiles = getattr(image, "tile", ())
    arguments = tiles[0][3] if tiles else ""
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
    return str(raw_mode).endswith(";16B")


def _decoded(path: str | os.PathLike[str]) -> np.ndarray:
    """The pixels of a file, with channels as RGB; only TIFFs are rotated."""
    with file_errors(path, "image"), PathManager.open(os.fspath(path), "rb") as file:
        values = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise ValueError("OpenCV cannot decode it")
    if values.ndim == 3 and values.shape[2] in (3, 4):
        order = [2, 1, 0, 3][: values.shape[2]]
        return np.ascontiguousarray(values[:, :, order])
    return np.asarray(values)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Damaged metadata beside sound pixels.
        return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate pixels or labels by an EXIF orientation.

    Args:
        pixels: (H, W) or (H, W, C).
        orientation: 1..8; others change nothing.
    """
    turned = pixels
    if orientation in _TRANSPOSED:
        turned = np.swapaxes(turned, 0, 1)
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    return turned if turned is pixels else np.ascontiguousarray(turned)
