"""Own images with segments of things and stuff, in COCO's panoptic format."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import log_first_n

from semask.data.datasets.catalog import is_registered, update_metadata
from semask.data.datasets.coco_folder import (
    Content,
    read_annotation_file,
    refuse,
    wrong_form,
)
from semask.utils.text import pluralize

# The keys that entries need; "annotations" has one entry for each image.
_REQUIRED = {
    "images": ("id", "file_name"),
    "categories": ("id", "name", "isthing"),
    "annotations": ("image_id", "file_name", "segments_info"),
}


def register_panoptic_folder(
    name: str,
    image_dir: str | os.PathLike[str],
    panoptic_dir: str | os.PathLike[str],
    json_file: str | os.PathLike[str],
    *,
    replace: bool = False,
    **metadata: Any,
) -> None:
    """Register an own dataset for DATASETS.TRAIN and DATASETS.TEST.

    The file is read when the dataset is used; the names of its categories, things and stuff in the
    order of their ids, are then in the metadata.

    Args:
        name: of the dataset, for configs.
        image_dir: folder of the images; "file_name" of "images" is relative to it.
        panoptic_dir: folder of the PNGs whose colours are ids (R + 256 G + 65536 B; 0 = none);
            "file_name" of "annotations" is relative to it.
        json_file: annotations in COCO's panoptic format.
        replace: take the place of a dataset of that name; without it, the same call again changes
            nothing.
        **metadata: further entries of the dataset's metadata.

    Raises:
        ValueError: the name belongs to another dataset.
    """
    images, maps, path = (
        os.path.abspath(os.path.expanduser(p)) for p in (image_dir, panoptic_dir, json_file)
    )
    entries = {
        "image_root": images,
        "panoptic_root": maps,
        "panoptic_json": path,
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": 255,
        **metadata,
    }
    if is_registered(name, entries, replace=replace):
        return
    DatasetCatalog.register(name, partial(load_panoptic_folder, path, images, maps, name))
    MetadataCatalog.get(name).set(**entries)


def load_panoptic_folder(
    json_file: str,
    image_dir: str,
    panoptic_dir: str,
    dataset_name: str | None = None,
    hint: str = "",
) -> list[dict[str, Any]]:
    """Read a file of annotations in COCO's panoptic format.

    Args:
        json_file: the file.
        image_dir, panoptic_dir: folders of images and maps, which are not read.
        dataset_name: registered name whose metadata get the categories.
        hint: what to say in addition where the file does not exist.

    Returns:
        Detectron2's standard dicts, in the order of the image ids, with "pan_seg_file_name" and
        "segments_info", whose category ids are 0..K-1 in the order of the ids in the file.

    Raises:
        AnnotationFileError: the file has another format, or contradicts itself.
        DataError: it is missing or cannot be read.
    """
    content = _read(json_file, hint)
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    contiguous = {entry["id"]: index for index, entry in enumerate(categories)}
    things = {entry["id"] for entry in categories if entry["isthing"]}
    if dataset_name is not None:
        update_metadata(
            dataset_name,
            stuff_classes=[entry["name"] for entry in categories],
            thing_classes=[entry["name"] for entry in categories if entry["id"] in things],
            stuff_dataset_id_to_contiguous_id=contiguous,
            thing_dataset_id_to_contiguous_id={
                given: index for given, index in contiguous.items() if given in things
            },
        )
    images = {entry["id"]: entry for entry in content["images"]}
    alone = images.keys() - {entry["image_id"] for entry in content["annotations"]}
    if alone:
        names = sorted(images[image_id]["file_name"] for image_id in alone)
        log_first_n(
            logging.WARNING,
            f"'{json_file}' has no entry in 'annotations' for {pluralize(len(names), 'image')}, "
            f"which are left out; the first is '{names[0]}'.",
            name=__name__,
            key="message",
        )
    return [
        {
            **{
                key: images[entry["image_id"]][key]
                for key in ("height", "width")
                if key in images[entry["image_id"]]
            },
            "file_name": os.path.join(image_dir, images[entry["image_id"]]["file_name"]),
            "image_id": entry["image_id"],
            "pan_seg_file_name": os.path.join(panoptic_dir, entry["file_name"]),
            "segments_info": [
                {
                    "id": segment["id"],
                    "category_id": contiguous[segment["category_id"]],
                    "isthing": segment["category_id"] in things,
                    "iscrowd": int(bool(segment.get("iscrowd", 0))),
                }
                for segment in entry["segments_info"]
            ],
        }
        for entry in sorted(content["annotations"], key=lambda entry: entry["image_id"])
    ]


def _read(json_file: str, hint: str) -> Content:
    """The file's content, checked for consistency."""
    content = read_annotation_file(json_file, hint)
    form = wrong_form(content, _REQUIRED, kind="COCO's panoptic format")
    found = list(form) or list(_wrong_values(content)) or list(_contradictions(content))
    refuse(json_file, found)
    return content


def _wrong_values(content: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Ids, names and segments that are of another type."""
    for part, key in (("images", "id"), ("categories", "id"), ("annotations", "image_id")):
        if {type(entry[key]) for entry in content[part]} not in ({int}, {str}):
            yield f"has values of {key} in '{part}' that are neither all integers nor all strings."
    for part, key in (
        ("images", "file_name"),
        ("categories", "name"),
        ("annotations", "file_name"),
    ):
        wrong = [entry for entry in content[part] if not isinstance(entry[key], str)]
        if wrong:
            yield f"has entries of '{part}' whose {key} is not a string: {str(wrong[0])[:200]}."
    for entry in content["annotations"]:
        segments = entry["segments_info"]
        if not isinstance(segments, list) or not all(_is_segment(segment) for segment in segments):
            yield (
                f"has segments_info of '{entry['file_name']}' that is not a list of segments, each "
                f"with a number or a string as id and category_id: {str(segments)[:200]}."
            )


def _is_segment(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), int | float | str | None) for key in ("id", "category_id")
    )


def _contradictions(content: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Duplicate ids, references to ids that do not exist, and names outside the folders."""
    for part, key in (("images", "id"), ("categories", "id"), ("annotations", "image_id")):
        numbers = Counter(entry[key] for entry in content[part])
        repeated = [str(number) for number, times in numbers.items() if times > 1]
        if repeated:
            yield f"has duplicates of {key} in '{part}': {', '.join(repeated[:10])}."
    images = {entry["id"] for entry in content["images"]}
    categories = {entry["id"] for entry in content["categories"]}
    for entry in content["annotations"]:
        if entry["image_id"] not in images:
            yield f"has an annotation of image {entry['image_id']!r}, which is not in 'images'."
        ids = Counter(segment.get("id") for segment in entry["segments_info"])
        for number, times in ids.items():
            if not isinstance(number, int) or number < 1 or times > 1:
                yield (
                    f"has a segment of the id {number!r} {times} times in '{entry['file_name']}'; "
                    "ids must be integers from 1, unique in an image."
                )
        unknown = {segment.get("category_id") for segment in entry["segments_info"]} - categories
        if unknown:
            yield (
                f"has segments of the category_id {sorted(map(str, unknown))[0]} in "
                f"'{entry['file_name']}', which is not in 'categories'."
            )
    names = Counter(entry["name"] for entry in content["categories"])
    for name, times in names.items():
        if times > 1:
            yield f"has {times} 'categories' with the name '{name}': rename them."
    for entry in (*content["images"], *content["annotations"]):
        name = str(entry["file_name"])
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            yield f"names '{name}', which is outside the folder of the images or maps."
