"""Finding the files of a source: images by the names in labels, splits by their folders."""

import contextlib
import functools
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from semask.data.importers.contract import LabelFileError
from semask.errors import DataError
from semask.utils import files
from semask.utils.files import parse_json
from semask.utils.text import composed, one_line

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".avif", ".npy"),
    *(".jfif", ".jpe", ".ppm", ".tga"),
)

_SPLIT_WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}


def split_of(*names: str | Path) -> str:
    """The split of a file, from the words of its path; the last matching name decides.

    Args:
        names: relative paths, such as "train/_annotations.coco.json" or "instances_val2017.json".

    Returns:
        "train", "val", "test", or "" if no name matches.
    """
    for name in reversed(names):
        words = [word for word in re.split(r"[^a-z]+", str(name).lower()) if word]
        for split, known in _SPLIT_WORDS.items():
            if any(word in known for word in words):
                return split
    return ""


def files_below(folder: Path, *suffixes: str) -> list[Path]:
    """Files with one of the (lower-case) suffixes, or all; see ``utils.files.files_below``.

    Raises:
        DataError: a folder cannot be read.
    """
    return [
        path for path in files.files_below(folder) if path.name.lower().endswith(suffixes or "")
    ]


def first_file(paths: Iterable[Path], accepts: Callable[[Path], bool]) -> Path | None:
    """The first of some files that a test accepts; one that cannot be read is passed over."""
    for path in paths:
        with contextlib.suppress(LabelFileError):
            if accepts(path):
                return path
    return None


def some_files(folder: Path, *suffixes: str, limit: int = 8) -> list[Path]:
    """As :func:`files_below`, but only the first few of each folder, for recognition."""
    by_folder: dict[Path, int] = defaultdict(int)
    chosen = []
    for path in files_below(folder, *suffixes):
        by_folder[path.parent] += 1
        if by_folder[path.parent] <= limit:
            chosen.append(path)
    return chosen


@functools.lru_cache(maxsize=4)
def cached_json(path: Path) -> Any:
    """The content of a JSON file, cached between recognising and reading."""
    return load_json(path)


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        LabelFileError: the file is empty, damaged or not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise LabelFileError(f"'{path}' is empty.")
        return parse_json(text)
    except (OSError, ValueError) as error:
        if isinstance(error, LabelFileError):
            raise
        raise LabelFileError(f"'{path}' is not valid JSON: {one_line(error)}.") from error


def load_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file.

    Raises:
        LabelFileError: the file is empty, damaged, or declares entities, which annotations never
            need.
    """
    try:
        content = path.read_bytes()
        if b"<!ENTITY" in content:
            raise LabelFileError(f"'{path}' declares XML entities, which are not supported.")
        return ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError) as error:
        raise LabelFileError(f"'{path}' is not valid XML: {one_line(error)}.") from error


def load_lines(path: Path) -> list[str]:
    """The lines of a text file, without line breaks.

    Raises:
        LabelFileError: the file is not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise LabelFileError(f"'{path}' is not a readable text file: {one_line(error)}.") from error


def stated_size(width: Any, height: Any, where: str) -> tuple[int, int] | None:
    """The (width, height) that labels state; None = they state none, or 0.

    Args:
        width, height: numbers or their texts, in pixels.
        where: the file and the entry, for the message.

    Raises:
        LabelFileError: one is not a number.
    """
    try:
        size = int(float(width or 0)), int(float(height or 0))
    except (TypeError, ValueError, OverflowError) as error:
        raise LabelFileError(
            f"{where} has the size {width!r} x {height!r}; width and height must be numbers."
        ) from error
    return size if all(size) else None


class ImageFiles:
    """The images in one or several folders, looked up by the names in label files."""

    def __init__(self, *folders: Path | None) -> None:
        """
        Args:
            folders: to be searched recursively; None is ignored.
        """
        self.folders = [folder for folder in folders if folder is not None]
        self.paths: dict[Path, str] = {}
        for folder in self.folders:
            for path in files_below(folder, *IMAGE_SUFFIXES):
                self.paths.setdefault(path, path.relative_to(folder).as_posix())
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in self.paths:
            self._by_name[composed(path.name).lower()].append(path)
            self._by_stem[composed(path.stem).lower()].append(path)

    def relative(self, path: Path) -> str:
        """The path of an image relative to its folder, with "/"."""
        return self.paths.get(path, path.name)

    def find(self, name: str, near: Path) -> Path | None:
        r"""The image that a label file refers to.

        Args:
            name: a file name, a relative path, or an absolute path of another machine, with "/" or
                "\".
            near: the label file.

        Returns:
            The image at that path, relative to the label file's folder or a searched one; else the
            one whose path matches the longest suffix of the name; None = there is none.

        Raises:
            DataError: several images match equally well.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        for folder in (near.parent, *self.folders):
            path = Path(os.path.normpath(folder / wanted))
            if path in self.paths:
                return path
        return self._best(self._by_name.get(composed(wanted.name).lower(), []), wanted, near)

    def find_stem(self, stem: str, near: Path) -> Path | None:
        """The same for a path without a suffix."""
        wanted = PurePosixPath(stem.replace("\\", "/"))
        return self._best(self._by_stem.get(composed(wanted.name).lower(), []), wanted, near)

    def _best(self, candidates: list[Path], wanted: PurePosixPath, near: Path) -> Path | None:
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        ends = [composed(part).lower() for part in wanted.parts[-2::-1]]

        def agreement(path: Path) -> tuple[int, bool, int]:
            parts = [composed(part).lower() for part in path.parts[-2::-1]]
            pairs = zip(parts, ends, strict=False)
            length = next(
                (i for i, (a, b) in enumerate(pairs) if a != b), min(len(parts), len(ends))
            )
            same_split = split_of(self.relative(path)) == split_of(*near.parts[-3:])
            shared = len(os.path.commonpath([path, near]))
            return length, same_split, shared

        ranked = sorted(candidates, key=agreement, reverse=True)
        if agreement(ranked[0]) == agreement(ranked[1]):
            raise DataError(
                f"'{near}' refers to an image '{wanted}', and both '{ranked[0]}' and '{ranked[1]}' "
                "match; rename or remove one."
            )
        return ranked[0]


def unused_images(images: ImageFiles, used: set[Path]) -> Iterator[Path]:
    """Images without labels."""
    yield from (path for path in images.paths if path not in used)
