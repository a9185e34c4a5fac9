"""Opens image files of listed formats, with one picture each, and explains failures.

Pillow would open all formats it knows, PostScript by starting another program.
"""

import contextlib
import errno
import os
import re
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO

from detectron2.utils.file_io import PathManager
from PIL import Image, ImageFile, TiffImagePlugin

from semask.errors import ConfigError, DataError, UnreadableError
from semask.utils.text import one_line

# "JPEG" includes the files of several pictures that phones write, whose first is the photograph.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM", "TGA", "AVIF")

MAX_PIXELS = "SEMASK_MAX_IMAGE_PIXELS"
"""Environment variable: pixels that an image file may have; without it Pillow's limit counts."""

JPEG_LABELS = (
    "JPEG changes the values of pixels, so that it cannot hold class indices: make the label maps "
    "again as PNG (renaming or converting the files does not bring the indices back)."
)

_DAMAGED = "The file is damaged, incomplete or of an unknown format; download or save it again."
_LAYOUT = "Save it as grey or RGB with 8 or 16 integer bits per channel."
# First bytes of files that are often taken for images, and their kind.
_SIGNATURES = {
    b"%!PS": "a PostScript file",
    b"%PDF": "a PDF file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"PK\x03\x04": "an archive",
    b"version https://git-lfs": "a Git LFS pointer, whose content has not been downloaded",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"<svg": "an SVG drawing",
}
_SAMPLE_FORMATS = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers"}
# Channels of the photometric interpretations (tag 262) that may have others beside them.
_COLOURS = {0: 1, 1: 1, 2: 3}

_lock = threading.Lock()
_readers = 0
_filling = False
_limit_set: str | None = None


@contextlib.contextmanager
def opened_image(path: str | os.PathLike[str], what: str) -> Iterator[Image.Image]:
    """The opened image; every failure in the ``with`` block becomes an error of the file.

    Args:
        path: a file, or anything Detectron2's ``PathManager`` opens.
        what: a noun for the file, for messages, such as "image".

    Raises:
        UnreadableError: the file is missing, damaged or no image.
        DataError: it is of a kind that is not read, too large, or has several pages.
    """
    _apply_limit()
    with (
        _without_filling(),
        file_errors(path, what),
        PathManager.open(os.fspath(path), "rb") as file,
        _open(file, path, what) as image,
    ):
        _check_one_page(image, path, what)
        yield image


@contextlib.contextmanager
def file_errors(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn failures to open or decode a file in the ``with`` block into a ``DataError``.

    Args:
        path, what: as for :func:`opened_image`.

    Raises:
        UnreadableError: a decoder has failed, or the file system.
        DataError: the image has more pixels than are read, or this process has too many open files.
        MemoryError: the memory is not enough, which need not be the file's fault.
    """
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        error.add_note(f"This happened while reading the {what} '{path}'.")
        raise
    except FileNotFoundError as error:
        raise UnreadableError(
            f"There is no {what} '{path}'.", "Is the dataset complete?"
        ) from error
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        size = f"{int(pixels[0]) / 1e6:.0f} megapixels" if pixels else "very many pixels"
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(
            f"The {what} '{path}' has {size}, and at most {limit / 1e6:.0f} megapixels are read.",
            f"If that is right, set the environment variable {MAX_PIXELS} to a larger number of "
            "pixels; or cut the image into tiles.",
        ) from error
    except Exception as error:  # Decoders raise nearly anything at damaged files.
        if isinstance(error, OSError) and error.errno is not None:
            raise _system_error(error, path, what) from error
        reason = one_line(error)
        raise UnreadableError(f"Cannot read {what} '{path}': {reason}.", _DAMAGED) from error


def _system_error(error: OSError, path: str | os.PathLike[str], what: str) -> DataError:
    """The error for a failure of the operating system, not of a decoder."""
    message = f"Cannot read {what} '{path}': {error.strerror}."
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return DataError(
            message,
            "The file may be sound. Raise the limit of open files (ulimit -n), or use fewer data "
            "loading processes (DATALOADER.NUM_WORKERS).",
        )
    return UnreadableError(message, "Check its permissions, and the disk or network it is on.")


def is_jpeg(suffix: str) -> bool:
    """Whether files with this suffix are JPEGs."""
    return suffix.lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif"))


def unused_channels(image: Image.Image) -> int:
    """Channels of a TIFF besides grey or RGB that are not declared as alpha, such as infrared."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    colours = _COLOURS.get(image.tag_v2.get(262) or 0)
    if colours is None or any(image.tag_v2.get(338, ())):  # 0 = unspecified, 1 and 2 = alpha
        return 0
    return max(0, int(image.tag_v2.get(277, colours)) - colours)


def _open(file: BinaryIO, path: str | os.PathLike[str], what: str) -> Image.Image:
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        return Image.open(file, formats=formats)
    except (Image.DecompressionBombError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if layout := _unsupported_tiff(file):
            raise DataError(
                f"The {what} '{path}' is a TIFF with {layout}, which cannot be read.", _LAYOUT
            ) from error
        if kind := _other_kind(file):
            raise UnreadableError(
                f"The {what} '{path}' is {kind}, not an image, although its name ends like one's.",
                f"The formats that can be read are {', '.join(formats)}.",
            ) from error
        raise


def _unsupported_tiff(file: BinaryIO) -> str:
    """The samples of a TIFF in words, if Pillow cannot read them."""
    try:
        file.seek(0)
        header = file.read(8)
        if header[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return ""
        directory = TiffImagePlugin.ImageFileDirectory_v2(
            header + (file.read(8) if 43 in header[2:4] else b"")
        )
        file.seek(directory.next)
        directory.load(file)
        channels = int(directory.get(277, 1))
        bits = max(directory.get(258, (1,)))
        kind = max(directory.get(339, (1,)))
    except Exception:  # It is damaged as well; what Pillow has said counts.
        return ""
    if channels in (1, 3, 4) and bits in (1, 2, 4, 8, 16) and kind == 1:
        return ""
    samples = _SAMPLE_FORMATS.get(kind, "values of an unknown kind")
    return f"{channels} channel{'s' * (channels != 1)} of {bits}-bit {samples}"


def _other_kind(file: BinaryIO) -> str:
    file.seek(0)
    start = file.read(64)
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return "a HEIC photograph"
    found = (kind for signature, kind in _SIGNATURES.items() if start.startswith(signature))
    return next(found, "")


def _check_one_page(image: Image.Image, path: str | os.PathLike[str], what: str) -> None:
    """Refuse stacks and animations, of which only the first picture would be used."""
    if image.format == "MPO":
        return
    pages = frames = getattr(image, "n_frames", 1)
    if frames > 1 and isinstance(image, TiffImagePlugin.TiffImageFile):
        pages = 1 + sum(_is_page(image, index) for index in range(1, frames))
        image.seek(0)
    if pages > 1:
        raise DataError(
            f"The {what} '{path}' has {pages} pages or frames, but must have one.",
            "Save the one to use as a separate file, or each under its own name.",
        )


def _is_page(image: TiffImagePlugin.TiffImageFile, index: int) -> bool:
    """Whether a directory of a TIFF is another picture, not a smaller copy or a mask of one."""
    try:
        image.seek(index)
        return not int(image.tag_v2.get(254, 0)) & 0b101
    except SyntaxError:  # of a kind that Pillow does not read
        return True


@contextlib.contextmanager
def _without_filling() -> Iterator[None]:
    """Suspend Pillow's filling of truncated images with grey, if another library has set it.

    The flag is global: the first of several threads saves it, the last restores it.
    """
    global _readers, _filling
    with _lock:
        if _readers == 0:
            _filling, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if _readers == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _filling


def _apply_limit() -> None:
    """Apply the environment variable's limit to Pillow, once for each value."""
    global _limit_set
    value = os.environ.get(MAX_PIXELS)
    if value is None or value == _limit_set:
        return
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(
            f"The environment variable {MAX_PIXELS} is '{value}'; it must be a number of pixels, "
            "such as 500000000."
        )
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    with _lock:
        Image.MAX_IMAGE_PIXELS = -(-int(value) // 2)  # Pillow refuses twice as many.
        _limit_set = value
