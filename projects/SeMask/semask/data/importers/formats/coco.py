"""COCO's detection format, also as exported by Roboflow, CVAT and Label Studio.

One or several JSON files with "images", "categories" and "annotations". Roboflow puts each file
next to its images, with an unused category 0 as parent of the others.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from semask.data.annotations import inspect
from semask.data.importers.contract import (
    ImportedImage,
    Importer,
    LabelFileError,
    Labels,
    Region,
    Source,
    register_format,
)
from semask.data.importers.files import (
    ImageFiles,
    cached_json,
    files_below,
    first_file,
    some_files,
    split_of,
    stated_size,
    unused_images,
)
from semask.errors import DataError

# Files of a dataset are larger than files of one image, and few, so that reading them is cheap.
_LOOKED_AT = 6


def json_files(source: Source) -> list[Path]:
    """The JSON files that are read to recognise a format of few large files."""
    if source.root.is_file():
        return [source.root] if source.root.suffix.lower() == ".json" else []
    files = some_files(source.folder, ".json", limit=4)
    return sorted(files, key=lambda path: -path.stat().st_size)[:_LOOKED_AT]


def is_coco(content: Any, *, panoptic: bool) -> bool:
    """Whether the content of a JSON file is COCO's panoptic or detection format."""
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), list) for part in ("images", "annotations", "categories")
    ):
        return False
    first: Any = next(iter(content["annotations"]), {})
    return (isinstance(first, dict) and "segments_info" in first) == panoptic


def annotation_files(source: Source, *, panoptic: bool) -> list[Path]:
    """All files of the kind, those of one name and two parts among them."""
    files = [source.root] if source.root.is_file() else files_below(source.folder, ".json")
    return [path for path in files if _has_kind(path, panoptic)]


def _has_kind(path: Path, panoptic: bool) -> bool:
    try:
        return is_coco(cached_json(path), panoptic=panoptic)
    except LabelFileError:
        return False


def check_entries(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse entries that are no objects, or have ids that are neither numbers nor strings.

    Raises:
        DataError: there is one; it names the file and the entry.
    """
    ids = {"images": ("id",), "categories": ("id",), "annotations": ("image_id", "category_id")}
    for part, keys in ids.items():
        for number, entry in enumerate(content[part]):
            if not isinstance(entry, dict):
                raise DataError(
                    f"'{path}': entry {number} of '{part}' is {str(entry)[:100]}; it must be an "
                    "object with keys and values."
                )
            for key in keys:
                if not isinstance(entry.get(key), int | float | str | None):
                    raise DataError(
                        f"'{path}': entry {number} of '{part}' has the {key} {entry[key]!r}; it "
                        "must be a number or a string."
                    )


def category_names(path: Path, content: Mapping[str, Any]) -> dict[Any, str]:
    """The names of a file's categories by their ids, in the order of the ids.

    Raises:
        DataError: an id or a name is missing, or an id is duplicate.
    """
    names: dict[Any, str] = {}
    for entry in content["categories"]:
        if not isinstance(entry, dict) or "id" not in entry or not entry.get("name"):
            raise DataError(f"'{path}' has a category without id or name: {str(entry)[:100]}.")
        if names.setdefault(entry["id"], str(entry["name"])) != str(entry["name"]):
            raise DataError(
                f"'{path}' has the category id {entry['id']} twice, as '{names[entry['id']]}' and "
                f"'{entry['name']}'. Category ids must be unique."
            )
    return dict(sorted(names.items(), key=lambda entry: str(entry[0]).zfill(12)))


@register_format
class Coco(Importer):
    """See the module."""

    name = "coco"
    title = "COCO"

    def recognise(self, source: Source) -> str:
        found = first_file(
            json_files(source), lambda path: is_coco(cached_json(path), panoptic=False)
        )
        return f"'{found.name}' has images, annotations and categories" if found else ""

    def read(self, source: Source) -> Labels:
        images = ImageFiles(source.images, source.folder)
        labels = Labels([], [], layout="coco")
        used: set[Path] = set()
        for path in annotation_files(source, panoptic=False):
            self._read_file(path, source, images, labels, used)
        for path in unused_images(images, used):
            labels.leave_out(path, "an image that no annotation file lists")
        return labels

    def _read_file(
        self, path: Path, source: Source, images: ImageFiles, labels: Labels, used: set[Path]
    ) -> None:
        content = cached_json(path)
        check_entries(path, content)
        names = category_names(path, content)
        by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for entry in content["annotations"]:
            if entry.get("category_id") not in names:
                raise DataError(
                    f"'{path}': annotation {entry.get('id')} has the category id "
                    f"{entry.get('category_id')!r}, which is not in 'categories'. Add it "
                    "there, or correct the annotation."
                )
            by_image[entry.get("image_id")].append(entry)
        labels.classes += [n for n in _used_names(content, names) if n not in labels.classes]
        known = {entry.get("id") for entry in content["images"]}
        for image_id in by_image.keys() - known:
            labels.leave_out(
                path, f"{len(by_image[image_id])} annotations of image id {image_id!r}, not listed"
            )
        split = split_of(*path.relative_to(source.folder).parts)
        for entry in content["images"]:
            name = str(entry.get("file_name") or "")
            image = images.find(name, path) if name else None
            if image is None:
                labels.leave_out(f"{path}: {name}", "labels without an image: there is no file")
                continue
            if image in used:
                labels.leave_out(f"{path}: {name}", "an image that is listed twice")
                continue
            used.add(image)
            annotations = by_image[entry.get("id")]
            labels.images.append(
                ImportedImage(
                    image,
                    images.relative(image),
                    path,
                    split or split_of(images.relative(image)),
                    stated_size(
                        entry.get("width"), entry.get("height"), f"'{path}': image '{name}'"
                    ),
                    regions=_regions_of(annotations, names),
                )
            )


def _used_names(content: Mapping[str, Any], names: Mapping[Any, str]) -> Iterator[str]:
    """The categories, without the parent that Roboflow lists as a category."""
    used = {entry["category_id"] for entry in content["annotations"]}
    parents = {entry.get("supercategory") for entry in content["categories"]}
    for number, name in names.items():
        if number in used or name not in parents or len(names) == 1:
            yield name
        elif all(
            entry.get("supercategory") == name
            for entry in content["categories"]
            if entry.get("name") == name
        ):
            yield name  # its own parent: an artefact of some exporters


def _regions_of(
    annotations: list[dict[str, Any]], names: Mapping[Any, str]
) -> Callable[[int, int], list[Region]]:
    def regions(height: int, width: int) -> list[Region]:
        return [
            coco_region(entry, names[entry["category_id"]], height, width) for entry in annotations
        ]

    return regions


def coco_region(annotation: Mapping[str, Any], name: str, height: int, width: int) -> Region:
    """An annotation as a region.

    Args:
        annotation: with "segmentation" and "bbox", in COCO's format.
        name: of its class.
        height, width: of the labelled image.

    Raises:
        LabelFileError: no part of it is usable; the message says why.
    """
    found = inspect(annotation, height, width)
    crowd = bool(annotation.get("iscrowd", 0))
    if isinstance(found.segmentation, dict):
        rle = found.segmentation
        if isinstance(rle["counts"], str):
            rle = {**rle, "counts": rle["counts"].encode()}
        return Region(name, rle=rle, crowd=crowd)
    if found.segmentation is not None:
        return Region(name, [np.asarray(p, float) for p in found.segmentation], crowd=crowd)
    if annotation.get("segmentation") or found.box is None:
        raise LabelFileError(", ".join(found.problems) or "no outline")
    x0, y0, x1, y1 = found.box
    return Region(name, box=(x0, y0, x1, y1), crowd=crowd)


def rle_of_mask(mask: np.ndarray) -> dict[str, Any]:
    """A (H, W) mask as pycocotools' compressed RLE."""
    rle: dict[str, Any] = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return rle
