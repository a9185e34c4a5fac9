"""YOLO's segmentation polygons: a .txt for each image, each line a class and x, y in 0..1.

Names and folders are in data.yaml (or another .yaml with "names"), as written by Ultralytics,
Roboflow and CVAT; Label Studio writes classes.txt. The labels of ``images/a.jpg`` are
``labels/a.txt``. An image without a file, or with an empty one, has no objects.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from semask.data.importers.contract import (
    ImportedImage,
    Importer,
    LabelFileError,
    Labels,
    Note,
    Region,
    Source,
    register_format,
)
from semask.data.importers.files import (
    ImageFiles,
    files_below,
    load_lines,
    some_files,
    split_of,
)
from semask.errors import DataError
from semask.utils.text import composed, one_line

_NAME_FILES = ("classes.txt", "obj.names")
# Text files next to labels that are not labels.
_NOT_LABELS = ("classes.txt", "train.txt", "val.txt", "test.txt", "readme", "notes")


@register_format
class Yolo(Importer):
    """See the module."""

    name = "yolo"
    title = "YOLO segmentation"

    def recognise(self, source: Source) -> str:
        if source.root.is_file():
            description = _description(source.root) if _is_yaml(source.root) else None
            return f"'{source.root.name}' has names" if description else ""
        described = [path for path in _yaml_files(source.folder) if _description(path)]
        if described:
            return f"'{described[0].name}' has names of classes"
        for path in some_files(source.folder, ".txt", limit=3):
            if _is_label_file(path) and _looks_like_labels(path):
                return f"'{path.name}' has lines of a class and coordinates"
        return ""

    def read(self, source: Source) -> Labels:
        names, folders = self._names(source)
        splits = _Splits(folders)
        images = ImageFiles(source.images, source.folder)
        labels = Labels(list(names), [], layout="folder")
        texts = {
            composed(str(path)): path
            for path in files_below(source.folder, ".txt")
            if _is_label_file(path)
        }
        used: dict[Path, Path] = {}
        bare = 0
        for image in images.paths:
            places = (texts.get(composed(str(path))) for path in _label_paths(image))
            text = next((path for path in places if path is not None), None)
            split = splits.of(image) or split_of(images.relative(image))
            if text in used:
                raise DataError(
                    f"'{used[text]}' and '{image}' have the same name up to the suffix, so that "
                    f"the labels '{text}' can belong to either; rename or remove one."
                )
            bare += text is None
            if text is not None:
                used[text] = image
            labels.images.append(
                ImportedImage(
                    image,
                    images.relative(image),
                    text or image,
                    split,
                    regions=_regions(text, names),
                )
            )
        if bare == len(labels.images):
            raise DataError(
                f"None of the {bare} images in '{source.folder}' has a label file.",
                "The labels of 'images/a.jpg' must be in 'labels/a.txt'.",
            )
        if bare:
            for item in labels.images:
                if item.source == item.image:
                    reason = "no label file: taken as an image without objects, as YOLO does"
                    labels.notes.append(Note("note", str(item.image), reason))
        for path in sorted(set(texts.values()) - used.keys()):
            labels.leave_out(path, "labels without an image")
        return labels

    def _names(self, source: Source) -> tuple[list[str], dict[str, list[Path]]]:
        """The classes, and the folders of each split if data.yaml has them."""
        candidates = [source.root] if source.root.is_file() else _yaml_files(source.folder)
        for path in candidates:
            description = _description(path)
            if description:
                names = description["names"]
                ordered = _ordered(path, names) if isinstance(names, dict) else names
                return [str(name) for name in ordered], _folders(path, description)
        for name in _NAME_FILES:
            for path in files_below(source.folder, name):
                return [line.strip() for line in load_lines(path) if line.strip()], {}
        if source.classes:
            return list(source.classes), {}
        raise DataError(
            f"There are YOLO labels in '{source.folder}', but no data.yaml or classes.txt with "
            "the class names; list them in the order of their indices with --classes."
        )


def _is_yaml(path: Path) -> bool:
    return path.suffix.lower() in (".yaml", ".yml")


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(
        some_files(folder, ".yaml", ".yml"), key=lambda path: (len(path.parts), path.name)
    )


def _description(path: Path) -> dict[str, Any] | None:
    """The content of a file like data.yaml; None for other files."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    named = isinstance(content, dict) and isinstance(content.get("names"), list | dict)
    return content if named and content["names"] else None


def _ordered(path: Path, names: dict[Any, Any]) -> list[Any]:
    try:
        numbers = sorted(int(number) for number in names)
    except (TypeError, ValueError) as error:
        raise DataError(f"'{path}': the keys of 'names' must be numbers: {error}.") from error
    if numbers != list(range(len(numbers))):
        raise DataError(f"'{path}': the keys of 'names' must be 0..{len(numbers) - 1}.")
    return [{int(number): name for number, name in names.items()}[number] for number in numbers]


def _folders(path: Path, description: dict[str, Any]) -> dict[str, list[Path]]:
    """The folders of each split; those that do not exist are ignored."""
    found: dict[str, list[Path]] = {}
    roots = [path.parent]
    if isinstance(description.get("path"), str):
        roots.insert(0, path.parent / description["path"])
    for split in ("train", "val", "test"):
        given = description.get(split) or description.get("valid" if split == "val" else split)
        entries = given if isinstance(given, list) else [given]
        for entry in entries:
            if not isinstance(entry, str):
                continue
            # Roboflow writes "../train/images" for the folder "train/images".
            for name in (entry, entry.removeprefix("../")):
                places = [(root / name).resolve() for root in roots]
                found.setdefault(split, []).extend(place for place in places if place.is_dir())
                for place in places:
                    if place.is_file() and place.suffix == ".txt":
                        found[split] += [(place.parent / line).resolve() for line in _listed(place)]
    # A folder that two splits share is ambiguous.
    splits = Counter(place for places in found.values() for place in set(places))
    return {
        split: [place for place in places if splits[place] == 1] for split, places in found.items()
    }


def _listed(path: Path) -> list[str]:
    return [line.strip() for line in load_lines(path) if line.strip()]


class _Splits:
    """The split of each image, by the folders and files of data.yaml."""

    def __init__(self, folders: Mapping[str, list[Path]]) -> None:
        self._of_place: dict[Path, str] = {}
        self._of_end: dict[tuple[str, ...], str] = {}
        for split, places in folders.items():
            for place in places:
                self._of_place.setdefault(place, split)
                if place.suffix:  # a file of a list, whose folders may be another machine's
                    self._of_end.setdefault(place.parts[-2:], split)

    def of(self, image: Path) -> str:
        """The split; "" = it is in none."""
        resolved = image.resolve()
        places = (self._of_place.get(place) for place in (resolved, *resolved.parents))
        return next((split for split in places if split), self._of_end.get(resolved.parts[-2:], ""))


def _is_label_file(path: Path) -> bool:
    low = path.name.lower()
    return low not in _NOT_LABELS and not low.startswith(("readme", "notes"))


def _looks_like_labels(path: Path) -> bool:
    try:
        lines = [line.split() for line in load_lines(path) if line.strip()]
        return bool(lines) and all(
            line[0].isdecimal() and len(line) >= 5 and [float(value) for value in line[1:]]
            for line in lines[:3]
        )
    except (LabelFileError, ValueError):
        return False


def _label_paths(image: Path) -> list[Path]:
    """Possible label files of an image: in "labels" instead of "images", or next to the image."""
    parts = list(image.with_suffix(".txt").parts)
    places = []
    for index in reversed([i for i, part in enumerate(parts) if part == "images"]):
        places.append(Path(*parts[:index], "labels", *parts[index + 1 :]))
    return [*places, image.with_suffix(".txt"), image.parent / "labels" / f"{image.stem}.txt"]


def _regions(path: Path | None, names: list[str]) -> Callable[[int, int], list[Region]]:
    def regions(height: int, width: int) -> list[Region]:
        lines = load_lines(path) if path is not None else []
        found = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"'{path}', line {number}"
            fields = line.split()
            try:
                index, values = int(fields[0]), np.array(fields[1:], dtype=np.float64)
            except ValueError as error:
                raise LabelFileError(
                    f"{where}: not a class and coordinates ({one_line(error)})"
                ) from error
            if not 0 <= index < len(names):
                raise DataError(
                    f"{where}: the class is {index}, but the names are for 0..{len(names) - 1}.",
                    "Add its name to data.yaml, or correct the file.",
                )
            if not np.isfinite(values).all():
                raise LabelFileError(f"{where}: a coordinate is not a number")
            scaled = values.copy()
            scaled[0::2] *= width
            scaled[1::2] *= height
            if values.size == 4:
                x, y, w, h = scaled.tolist()
                found.append(Region(names[index], box=(x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
            elif values.size >= 6 and values.size % 2 == 0:
                found.append(Region(names[index], [scaled]))
            else:
                raise LabelFileError(
                    f"{where}: {values.size} numbers are neither a box nor a polygon of x, y"
                )
        return found

    return regions
