"""The image files of the output: names, copies and properties."""

import os
import shutil
from collections import Counter
from pathlib import Path, PurePosixPath

from PIL import ExifTags

from semask.data.bands import stored_size
from semask.data.datasets.folder import IMAGE_EXTENSIONS
from semask.data.image_files import opened_image
from semask.data.importers.contract import ImportedImage, Labels, Note
from semask.data.importers.files import split_of
from semask.data.importers.raster import ImageFacts
from semask.errors import DataError, UnreadableError

# Folders named after their content, which are left out of the images' names.
_PLAIN_FOLDERS = ("images", "image", "img", "imgs", "jpegimages", "default", "data")


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
        suffix = whole.suffix if whole.suffix.lower() in IMAGE_EXTENSIONS else ".png"
        names.append(unique + suffix)
    return names


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
    width, height, channels = stored_size(path)
    return ImageFacts((width, height), (width, height), channels=channels)


def place(image: ImportedImage, target: Path, *, link: bool) -> None:
    """Copy an image file, or write it if it is embedded in the labels.

    Args:
        image: the image.
        target: the file to write.
        link: create a hard link if possible.

    Raises:
        DataError: it cannot be read.
    """
    if image.image is None:
        target.write_bytes(image.pixels() if image.pixels is not None else b"")
        return
    if image.image.suffix.lower() != target.suffix.lower():  # a format that folders do not support
        with opened_image(image.image, "image") as picture:
            picture.convert("RGB").save(target)
        return
    try:
        if link:
            os.link(image.image, target)
            return
    except OSError:
        pass  # another file system: copied
    shutil.copyfile(image.image, target)
