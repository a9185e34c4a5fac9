"""Own datasets in COCO's format: a folder of images and a file of annotations.

Mistakes in the structure of the file are explained, also for COCO's panoptic format.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from semask.data.datasets.catalog import is_registered, update_metadata
from semask.errors import DataError
from semask.utils.files import read_json
from semask.utils.text import one_line, pluralize

Content = dict[str, list[dict[str, Any]]]

_ANNOTATION_KEYS = ("id", "iscrowd", "bbox", "keypoints", "segmentation")
_REQUIRED = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id"),
}


class AnnotationFileError(DataError):
    """An annotation file with mistakes.

    Attributes:
        messages: all mistakes; the error's own text is the first.
    """

    def __init__(self, messages: Sequence[str]) -> None:
        """
        Args:
            messages: at least one.
        """
        super().__init__(messages[0])
        self.messages = list(messages)


def read_annotation_file(json_file: str, hint: str = "") -> Any:
    """The content of a file.

    Args:
        json_file: the file.
        hint: advice for a missing file.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        return read_json(json_file)
    except FileNotFoundError as error:
        missing = f"There is no annotation file '{json_file}'."
        raise DataError(f"{missing} {hint}" if hint else missing) from error
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise DataError(f"Annotation file '{json_file}' cannot be read: {reason}.") from error


def wrong_form(
    content: Any,
    required: Mapping[str, Sequence[str]],
    *,
    kind: str,
    may_be_empty: Collection[str] = (),
) -> Iterator[str]:
    """The reasons why a file is not in a format.

    Args:
        content: of the file.
        required: the lists that it must have, and the keys that each of their entries needs.
        kind: the format's name.
        may_be_empty: lists that may be empty.
    """
    for part, keys in required.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield (
                f"is not in {kind}: it needs '{part}', a list of entries with {', '.join(keys)}."
            )
            continue
        lacking = [entry for entry in entries if not all(key in entry for key in keys)]
        if lacking:
            absent = ", ".join(key for key in keys if key not in lacking[0])
            yield (
                f"has {len(lacking)} entries of '{part}' that are not complete; the first has no "
                f"{absent}: {str(lacking[0])[:200]}."
            )
        if not entries and part not in may_be_empty:
            yield f"has no {part}."


def refuse(json_file: str, found: Sequence[str]) -> None:
    """Refuse a file if mistakes were found.

    Args:
        json_file: the file.
        found: its mistakes, each as the end of a sentence.

    Raises:
        AnnotationFileError: there is a mistake.
    """
    if found:
        raise AnnotationFileError([f"Annotation file '{json_file}' {words}" for words in found])


def register_coco_folder(
    name: str,
    image_dir: str | os.PathLike[str],
    json_file: str | os.PathLike[str],
    *,
    allow_outside: bool = False,
    replace: bool = False,
    **metadata: Any,
) -> None:
    """Register an own dataset for DATASETS.TRAIN and DATASETS.TEST.

    The file is read when the dataset is used; the names of its categories are then in the
    metadata, in the order of their ids.

    Args:
        name: of the dataset, for configs.
        image_dir: folder of the images; "file_name" in the file is relative to it.
        json_file: annotations in COCO's format for detection: "images", "categories",
            "annotations" with "bbox" [x, y, width, height] and, for masks, "segmentation".
        allow_outside: "file_name" may be an absolute path, or lead out of ``image_dir`` by "..".
        replace: take the place of a dataset of that name; without it, the same call again changes
            nothing.
        **metadata: further entries of the dataset's metadata.

    Raises:
        ValueError: the name belongs to another dataset.
    """
    image_root, path = (os.path.abspath(os.path.expanduser(p)) for p in (image_dir, json_file))
    entries = {
        "json_file": path,
        "image_root": image_root,
        "evaluator_type": "coco",
        "allow_outside": allow_outside,
        **metadata,
    }
    if is_registered(name, entries, replace=replace):
        return
    loader = partial(load_coco_folder, path, image_root, name, allow_outside=allow_outside)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(**entries)


def load_coco_folder(
    json_file: str,
    image_dir: str,
    dataset_name: str | None = None,
    hint: str = "",
    *,
    allow_outside: bool = False,
) -> list[dict[str, Any]]:
    """Read a file of annotations in COCO's format.

    Args:
        json_file: the file.
        image_dir: folder of the images, which are not read.
        dataset_name: registered name whose metadata get the categories.
        hint: advice for a missing file.
        allow_outside: see :func:`register_coco_folder`.

    Returns:
        Detectron2's standard dicts, in the order of the image ids, with category ids 0..N-1 in
        the order of the ids in the file. Annotations keep their "id", and those that cannot be
        used are among them.

    Raises:
        AnnotationFileError: the file has another format, or contradicts itself.
        DataError: it is missing or cannot be read.
    """
    content = _read(json_file, hint, allow_outside=allow_outside)
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    contiguous = {entry["id"]: index for index, entry in enumerate(categories)}
    if dataset_name is not None:
        update_metadata(
            dataset_name,
            thing_classes=[entry["name"] for entry in categories],
            thing_dataset_id_to_contiguous_id=contiguous,
        )
    records = {
        entry["id"]: {
            "file_name": os.path.join(image_dir, entry["file_name"]),
            "image_id": entry["id"],
            "height": entry["height"],
            "width": entry["width"],
            "annotations": [],
        }
        for entry in sorted(content["images"], key=lambda entry: entry["id"])
    }
    for entry in content["annotations"]:
        annotation = {key: entry[key] for key in _ANNOTATION_KEYS if key in entry}
        annotation |= {
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": contiguous[entry["category_id"]],
        }
        records[entry["image_id"]]["annotations"].append(annotation)
    return list(records.values())


def _read(json_file: str, hint: str, *, allow_outside: bool) -> Content:
    """The file's content, checked for consistency."""
    alone = "Images alone can be looked at with `semask predict`."
    content = read_annotation_file(json_file, hint or alone)
    form = wrong_form(
        content, _REQUIRED, kind="COCO's format for detection", may_be_empty=("annotations",)
    )
    found = list(form) or [*_contradictions(content), *_wrong_values(content)]
    if not found and not allow_outside:
        found = list(_outside(content))
    refuse(json_file, found)
    return content


def _contradictions(content: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Duplicate ids, and references to ids that do not exist."""
    for part in _REQUIRED:
        if {type(entry["id"]) for entry in content[part]} not in ({int}, {str}, set()):
            yield f"has ids in '{part}' that are neither all integers nor all strings."
            continue
        numbers = Counter(entry["id"] for entry in content[part])
        repeated = [str(number) for number, times in numbers.items() if times > 1]
        if repeated:
            yield (
                f"has {len(repeated)} ids more than once in '{part}': {', '.join(repeated[:10])}. "
                "Ids must be unique."
            )
    for key, part in (("image_id", "images"), ("category_id", "categories")):
        known = [entry["id"] for entry in content[part]]
        wrong = _not_among(known, key, content["annotations"])
        if wrong:
            yield (
                f"has {len(wrong)} annotations with a {key} that is not in '{part}'; the first is "
                f"annotation {wrong[0]['id']} with {wrong[0][key]!r}."
            )


def _not_among(
    known: Sequence[Any], key: str, annotations: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    ids = {number for number in known if isinstance(number, int | str)}
    return [
        entry
        for entry in annotations
        if not isinstance(entry[key], int | float | str) or entry[key] not in ids
    ]


def _wrong_values(content: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """File names, sizes and names of categories that cannot be used."""
    for part, sound, words in (
        ("images", _is_image, "need file_name as a string, height and width as integers > 0"),
        ("categories", _is_category, "need name as a string"),
    ):
        wrong = [entry for entry in content[part] if not sound(entry)]
        if wrong:
            yield (
                f"has {len(wrong)} entries of '{part}' that {words}; the first is "
                f"{str(wrong[0])[:200]}."
            )
    flags = [
        entry
        for entry in content["annotations"]
        if "iscrowd" in entry and not (entry["iscrowd"] in (0, 1) or entry["iscrowd"] is None)
    ]
    if flags:
        yield (
            f"has {pluralize(len(flags), 'annotation')} whose iscrowd is neither 0 nor 1; the "
            f"first is annotation {flags[0]['id']} with {flags[0]['iscrowd']!r}."
        )
    numbers = Counter(str(entry["name"]) for entry in content["categories"])
    for name, times in numbers.items():
        if times > 1:
            yield (
                f"has {times} 'categories' with the name '{name}', whose results would be "
                "ambiguous: rename them, or remove unused ones."
            )


def _outside(content: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Names of images outside the folder of the images."""
    names = [entry["file_name"] for entry in content["images"]]
    wrong = [
        name
        for name in names
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir
    ]
    if wrong:
        yield (
            f"names {pluralize(len(wrong), 'image')} outside the folder of the images, the first "
            f"is '{wrong[0]}'. If you trust the file: ALLOW_OUTSIDE: True in the entry of "
            "DATASETS.COCO_FOLDERS, or register_coco_folder(..., allow_outside=True)."
        )


def _is_image(entry: Mapping[str, Any]) -> bool:
    sides = (entry["height"], entry["width"])
    return isinstance(entry["file_name"], str) and all(
        isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides
    )


def _is_category(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry["name"], str)


def category_ids(metadata: Any, number: int) -> list[int]:
    """The ids of the categories 0..number-1 in the dataset's file; 1, 2, ... if not known."""
    ids = {
        index: given
        for key in ("stuff_dataset_id_to_contiguous_id", "thing_dataset_id_to_contiguous_id")
        for given, index in (metadata.get(key) or {}).items()
    }
    return [ids.get(index, index + 1) for index in range(number)]
