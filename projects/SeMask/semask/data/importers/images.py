"""The image files of the output: names, copies and properties.

Images with bands need config keys: the range of values, and mean and std of each band.
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import ExifTags, Image

from semask.data.bands import ImageReader, read_values, upright_size
from semask.data.datasets.folder import IMAGE_EXTENSIONS
from semask.data.image_files import is_jpeg, opened_image
from semask.data.importers.contract import ImportedImage, Labels, Note
from semask.data.importers.files import split_of
from semask.data.importers.raster import ImageFacts
from semask.data.reading import read_image
from semask.errors import DataError, UnreadableError

# Folders named after their content, which are left out of the images' names.
_PLAIN_FOLDERS = ("images", "image", "img", "imgs", "jpegimages", "default", "data")

# Number of images to read for the values of their bands.
_SAMPLE = 32


def output_names(labels: Labels) -> list[str]:
    """The path of each image in its split, all different up to the suffix.

    Folders that name a split or that all images share are left out if names stay unique.
    """
    full = [PurePosixPath(image.name) for image in labels.images]
    short = [_short(path) for path in full]
    stems = Counter(path.with_suffix("").as_posix().lower() for path in short)
    files = Counter(path.as_posix().lower() for path in short)
    names: list[str] = []
    taken: set[str] = set()
    for image, whole, path in zip(labels.images, full, short, strict=True):
        stem = path.with_suffix("").as_posix()
        if stems[stem.lower()] > 1:
            clear = path if files[path.as_posix().lower()] == 1 else whole
            stem = "_".join(clear.parts).replace(".", "_")
            labels.notes.append(
                Note("changed", str(image.image or image.source), f"named '{stem}' in the output")
            )
        number, unique = 2, stem
        while unique.lower() in taken:
            unique, number = f"{stem}_{number}", number + 1
        taken.add(unique.lower())
        names.append(unique + _output_suffix(whole.suffix))
    return names


def _output_suffix(suffix: str) -> str:
    """The suffix under which folders have an image; other formats are converted to PNG."""
    if suffix.lower() in IMAGE_EXTENSIONS:
        return suffix
    return ".jpg" if is_jpeg(suffix) else ".png"


def _short(path: PurePosixPath) -> PurePosixPath:
    parts = [
        part
        for part in path.parts[:-1]
        if part.lower() not in _PLAIN_FOLDERS and not (split_of(part) and len(part) < 12)
    ]
    return PurePosixPath(*parts, path.name)


def image_facts(path: Path) -> ImageFacts:
    """Sizes and orientation of an image, which is decoded to check that it is intact.

    Raises:
        DataError: it cannot be read.
    """
    is_array = path.suffix.lower() == ".npy"
    try:
        if is_array:
            return _banded(path)
        with opened_image(path, "image") as image:
            image.load()
            stored = image.size
            try:
                orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
            except Exception:  # damaged metadata, which reading the image reports
                orientation = 1
            if image.format == "TIFF":  # Pillow has turned it already.
                orientation = 1
    except UnreadableError:
        raise
    except DataError:
        if is_array or path.suffix.lower() not in (".tif", ".tiff"):
            raise
        return _banded(path)
    upright = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    return ImageFacts(stored, upright, orientation)


def _banded(path: Path) -> ImageFacts:
    width, height, channels = upright_size(path)
    return ImageFacts((width, height), (width, height), channels=channels)


def place(image: ImportedImage, target: Path, *, link: bool) -> ImageFacts:
    """Copy an image file, or write it if it is embedded in the labels.

    Formats that folders do not support are written as upright pixels. Their labels may belong to
    the pixels as stored, so the returned properties are those of the source.

    Args:
        image: the image.
        target: the file to write.
        link: create a hard link if possible.

    Raises:
        DataError: it cannot be read.
    """
    if image.image is None:
        target.write_bytes(image.pixels() if image.pixels is not None else b"")
        return image_facts(target)
    if _output_suffix(image.image.suffix) != image.image.suffix and not is_jpeg(target.suffix):
        Image.fromarray(read_image(image.image)).save(target)
        return image_facts(image.image)
    if not (link and _linked(image.image, target)):
        shutil.copyfile(image.image, target)
    return image_facts(target)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system
        return False
    return True


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
