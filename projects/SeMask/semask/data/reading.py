"""Reads images and label maps into arrays, in the same way for training and evaluation.

Every image becomes 8-bit RGB and every label map 8-bit class indices; anything else is a
``DataError`` that names the file.
"""

import io
import logging
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import ExifTags, Image, ImageFile, ImageOps

from semask.data.image_files import JPEG_LABELS, file_errors, is_jpeg, opened_image, unused_channels
from semask.errors import DataError
from semask.utils.text import first_of, one_line, pluralize

logger = logging.getLogger(__name__)

MAX_CLASSES = 255
"""Classes of a dataset at most: label maps have 8 bits, and one value is for ignored pixels."""

# Pillow stretches 2-bit and 4-bit grey PNGs to 0..255; dividing restores the indices.
_STRETCH_OF_RAW_MODE = {"L;2": 85, "L;4": 17}

# In a table of LABEL_MAPS: no such raw value exists.
_UNKNOWN = -1

LABEL_MAPS: dict[str, np.ndarray] = {}
"""Registered tables from a dataset's raw label values to training ids, by name."""


def register_label_map(
    name: str,
    table: Sequence[int] | np.ndarray | Mapping[int, int],
    *,
    replace: bool = False,
) -> None:
    """Register a raw label layout, which dataset dicts name as "label_map".

    Args:
        name: e.g. "ade20k".
        table: training id (0..255, the ignore value included) of each raw value 0, 1, 2, ...; or
            of each raw value that exists, any other being an error in a file.
        replace: take the place of a table of that name.

    Raises:
        ValueError: a value is outside 0..255, or the name stands for another table already.
    """
    LABEL_MAPS[name] = check_label_map(name, table, replace=replace)


def check_label_map(
    name: str,
    table: Sequence[int] | np.ndarray | Mapping[int, int],
    *,
    replace: bool = False,
) -> np.ndarray:
    """The table that :func:`register_label_map` would register.

    Args:
        name, table, replace: as for :func:`register_label_map`.

    Returns:
        The training ids by raw value, int16; -1 = no such raw value exists.

    Raises:
        ValueError: a value is outside 0..255, or the name stands for another table already.
    """
    values = np.asarray(list(table.values()) if isinstance(table, Mapping) else table)
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.size == 0:
        raise ValueError(f"Label map '{name}' must be a list of integers.")
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"Label map '{name}' has ids outside 0..255.")
    if isinstance(table, Mapping):
        raw = np.asarray(list(table))
        if raw.dtype.kind not in "iu" or raw.min() < 0 or raw.max() > 65535:
            raise ValueError(f"Label map '{name}' has raw values that are not in 0..65535.")
        ids = np.full(int(raw.max()) + 1, _UNKNOWN, np.int16)
        ids[raw] = values
    else:
        ids = values.astype(np.int16)
    known = LABEL_MAPS.get(name)
    if not (replace or known is None or np.array_equal(known, ids)):
        raise ValueError(
            f"Label map '{name}' is registered already, with other values; choose another name, or "
            "register it with replace=True to replace it."
        )
    return ids


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a photograph of any usual kind.

    The EXIF orientation is applied. Grey, palette, CMYK and the like become RGB, transparency is
    dropped, and 16-bit channels keep their upper eight bits.

    Args:
        path: a file, or anything Detectron2's ``PathManager`` opens.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        DataError: the file is missing, truncated or damaged, or its pixels have no known range.
    """
    with opened_image(path, "image") as image:
        return rgb_pixels(image, path)


def rgb_pixels(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    """The pixels of an opened image, as :func:`read_image` gives them.

    Args:
        image: it is decoded here, with Pillow's own errors where it is damaged.
        path: the file, for messages.

    Raises:
        DataError: its pixels have no known range.
    """
    if image.mode in ("I", "F") and image.format != "PNG":
        raise DataError(
            f"Image '{path}' has 32-bit pixels (mode {image.mode}), whose range is unknown; "
            "save it with 8 or 16 bits per channel."
        )
    if unused := unused_channels(image):
        log_first_n(
            logging.WARNING,
            f"Image '{path}' has {pluralize(unused, 'channel')} in addition to RGB that are not "
            "marked as transparency, such as infrared. They are ignored, in other files too.",
            name=__name__,
        )
    image = _upright(image, path)
    if image.mode.startswith("I"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def is_nearly_black(pixels: np.ndarray, mode: str = "") -> bool:
    """Whether an image uses so little of its range that its values are probably wrong.

    Values of 0..1 or 0..15 in 8 bits, or of 10, 12 or 14 bits in a file of 16.

    Args:
        pixels: (H, W, C), 0..255.
        mode: how the file stores them, as ``image_mode`` says it; "" = not known.
    """
    deep = mode.startswith("I") or mode.endswith("uint16")
    return bool(pixels.max(initial=0) < (64 if deep else 16))


def read_label(path: str | os.PathLike[str], label_map: str | None = None) -> np.ndarray:
    """Read a label map: one channel with one class index per pixel.

    A palette image gives its indices, a MATLAB file (``.mat``) its array ``S``. Wider types are
    accepted where their values fit into 8 bits or the label map takes them there.

    Args:
        path: a file, or anything Detectron2's ``PathManager`` opens.
        label_map: name of a registered label map that turns the raw values into training ids.

    Returns:
        (H, W) uint8.

    Raises:
        DataError: the file is missing, truncated or damaged, has several channels, or has values
            that do not fit.
    """
    label = _read_raw_label(path)
    if label_map is not None:
        return _mapped(label, label_map, path)
    if label.dtype.itemsize > 1 and (label.max() > 255 or label.min() < 0):
        raise DataError(
            f"Label map '{path}' has values from {label.min()} to {label.max()}, and no label map "
            "for raw values is set; class indices must be in 0..255."
        )
    return label.astype(np.uint8)


def _read_raw_label(path: str | os.PathLike[str]) -> np.ndarray:
    """The values of a label map as they are in the file, (H, W) integers or booleans."""
    if is_matlab(os.fspath(path)):
        with file_errors(path, "label map"), PathManager.open(os.fspath(path), "rb") as file:
            return read_matlab_label(file)
    with opened_image(path, "label map") as image:
        bands = image.getbands()
        if len(bands) != 1:
            raise DataError(
                f"Label map '{path}' has {len(bands)} channels ({image.mode}).",
                "It must have one, with the class index of each pixel. If it is a picture in "
                "class colours, convert it into indices first.",
            )
        stretch = _stretch(image)
        label = np.asarray(_upright(image, path))
    if label.dtype.kind not in "iub":
        raise DataError(f"Label map '{path}' has {label.dtype} values; save it as integers.")
    return label if stretch == 1 else label // stretch


def check_label_values(
    label: np.ndarray, num_classes: int, ignore: int, path: str | os.PathLike[str]
) -> None:
    """Refuse a label map with a value that is neither a class nor the ignore value.

    Args:
        label: (H, W) uint8.
        num_classes: K; 0..K-1 are the classes.
        ignore: the value of ignored pixels.
        path: the file, for the message.

    Raises:
        DataError: such values exist; it lists them with their numbers of pixels.
    """
    # Nearly all maps are valid, and this test is ten times faster than counting their values.
    if not ((label >= num_classes) & (label != ignore)).any():
        return
    counts = np.bincount(label.ravel(), minlength=256)
    counts[:num_classes] = 0
    if 0 <= ignore < counts.size:
        counts[ignore] = 0
    wrong = np.flatnonzero(counts)
    if wrong.size:
        listed = [f"{value} ({pluralize(counts[value], 'pixel')})" for value in wrong]
        raise DataError(
            f"Label map '{path}' has values that are not classes: {first_of(listed, 10)}.",
            f"Allowed are 0..{num_classes - 1} and {ignore} for ignored pixels. Correct the file, "
            "the dataset's label map, or its classes (of folders in a config: "
            "DATASETS.FOLDER_CLASSES; otherwise see MODEL.SEM_SEG_HEAD.NUM_CLASSES)."
            + (" " + JPEG_LABELS if is_jpeg(os.fspath(path)) else ""),
        )


def check_same_size(
    image: np.ndarray,
    label: np.ndarray,
    image_path: str | os.PathLike[str],
    label_path: str | os.PathLike[str],
) -> None:
    """Refuse an image and a label map of different size.

    Raises:
        DataError: (H, W) differ; it names both files and sizes.
    """
    if image.shape[:2] != label.shape[:2]:
        raise DataError(
            f"Image '{image_path}' is {image.shape[1]}x{image.shape[0]} pixels (width x height, "
            f"upright) but its label map '{label_path}' is {label.shape[1]}x{label.shape[0]}.",
            "Every pixel of the image needs one label: check that the two are a pair.",
        )


def _upright(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    """``image`` turned as its EXIF orientation says."""
    if image.format == "TIFF":  # Pillow turns it while loading, and early releases again below.
        return image
    image.load()  # A damaged image must not be taken for damaged metadata.
    try:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if upright else ImageOps.exif_transpose(image)  # It always copies.
    except Exception as error:  # Damaged metadata beside sound pixels.
        logger.warning("'%s': the EXIF orientation is unreadable and ignored (%s)", path, error)
        return image


def _stretch(image: Image.Image) -> int:
    """The factor by which Pillow will multiply the values of a 2-bit or 4-bit grey PNG."""
    if not isinstance(image, ImageFile.ImageFile) or image.format != "PNG" or not image.tile:
        return 1
    arguments = image.tile[0][3]
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
    return _STRETCH_OF_RAW_MODE.get(str(raw_mode), 1)


def _mapped(label: np.ndarray, name: str, path: str | os.PathLike[str]) -> np.ndarray:
    table = LABEL_MAPS.get(name)
    if table is None:
        known = ", ".join(sorted(LABEL_MAPS)) or "none"
        raise DataError(f"'{path}' names the label map '{name}'; registered are: {known}.")
    label = label.astype(np.uint8) if label.dtype == bool else label
    if label.size and (label.max() >= table.size or label.min() < 0):
        raise DataError(
            f"Label map '{path}' has values from {label.min()} to {label.max()}; the label map "
            f"'{name}' is for 0..{table.size - 1}. Is it the file of another dataset?"
        )
    if label.dtype == np.uint8 and label.size:
        ids = cv2.LUT(label, np.resize(table, 256))  # Several times faster than indexing.
    else:
        ids = table[label]
    if ids.size and ids.min() == _UNKNOWN:
        values, counts = np.unique(label[ids == _UNKNOWN], return_counts=True)
        pairs = zip(values[:10], counts, strict=False)
        listed = ", ".join(f"{value} ({pluralize(count, 'pixel')})" for value, count in pairs)
        raise DataError(
            f"Label map '{path}' has raw values that are not in the table of '{name}': {listed}.",
            "Is it the file of another dataset?",
        )
    return ids.astype(np.uint8)


# The array that holds the labels.
LABEL_ARRAY = "S"


def is_matlab(path: str) -> bool:
    """Whether ``path`` is the name of a MATLAB file."""
    return path.lower().endswith(".mat")


def read_matlab_label(file: BinaryIO) -> np.ndarray:
    """The array ``S`` of a MATLAB file (version 4 to 7.2).

    Args:
        file: opened for reading bytes.

    Returns:
        (H, W) integers. MATLAB's default type is double: whole numbers of it are converted.

    Raises:
        ValueError: the file is damaged, or has no such array of integers.
    """
    from scipy import io as scipy_io  # Slow to import, and few datasets need it.

    content = io.BytesIO(file.read())
    try:
        found = scipy_io.loadmat(content, variable_names=[LABEL_ARRAY]).get(LABEL_ARRAY)
        names = [] if found is not None else [name for name, *_ in scipy_io.whosmat(content)]
    except MemoryError:
        raise
    except Exception as error:
        # SciPy raises nearly any error for a damaged file.
        reason = one_line(error)
        raise ValueError(f"not a valid MATLAB file ({reason})") from error
    if found is None:
        raise ValueError(
            f"it has no array '{LABEL_ARRAY}' but {', '.join(names) or 'nothing at all'}"
        )
    label = np.asarray(found)
    if label.ndim != 2 or label.size == 0 or label.dtype.kind not in "iubf":
        raise ValueError(
            f"its array '{LABEL_ARRAY}' is {label.dtype} of shape {label.shape}; it has to be a "
            "matrix of integers"
        )
    if label.dtype.kind == "f":
        whole = label.astype(np.int64) if np.isfinite(label).all() else None
        if whole is None or not np.array_equal(whole, label):
            raise ValueError(f"its array '{LABEL_ARRAY}' has values that are not integers")
        return whole
    return label
