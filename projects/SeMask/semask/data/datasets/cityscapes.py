"""Cityscapes with fine annotations as its archives unpack: 19 classes, 2048 x 1024 pixels.

2,975 training, 500 validation and 1,525 test images: Cordts et al., arXiv 1604.01685. Label maps
are ``*_gtFine_labelTrainIds.png`` where these have been made with the dataset's own scripts, and
``*_gtFine_labelIds.png`` otherwise. The label maps of the test images are public only as blanks.

`semask prepare cityscapes` turns ``*_gtFine_instanceIds.png`` into the files for instance and
panoptic segmentation. A pixel's value there is the label id (0..33) for stuff and for groups of
unseparated objects, and for instances 1000 times the label id plus the instance number. The
panoptic files equal those that ``createPanopticImgs`` of the dataset's own scripts writes, so that
Detectron2's ``cityscapes_fine_panoptic_*`` find them as well; segment ids are the pixel values.
"""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from PIL import Image

from semask.data.datasets.catalog import datasets_root, layout_hint, register_sem_seg
from semask.data.datasets.pairs import find_files, pair_files
from semask.data.datasets.prepared import (
    Annotated,
    Prepared,
    Progress,
    Segment,
    describe_segments,
    instance_file,
    load_instances,
    load_segments,
    panoptic_files,
    prepare_split,
    register_prepared,
    save_ids,
)
from semask.data.image_files import opened_image
from semask.data.reading import register_label_map
from semask.errors import DataError
from semask.utils.files import replacing

LABEL_MAP = "cityscapes_label_ids"
SPLITS = ("train", "val", "test")
PREPARED_SPLITS = ("train", "val")  # of the test images the annotations are not public
CLASSES = [entry["name"] for entry in CITYSCAPES_CATEGORIES]
COLORS = [entry["color"] for entry in CITYSCAPES_CATEGORIES]
_THINGS = [entry for entry in CITYSCAPES_CATEGORIES if entry["isthing"]]
_IMAGE, _TRAIN_IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png"
_LABEL_IDS = "_gtFine_labelIds.png"
_LAYOUT = (
    "cityscapes/leftImg8bit/{train,val,test}/CITY/NAME_leftImg8bit.png    photographs",
    "cityscapes/gtFine/{train,val,test}/CITY/NAME_gtFine_labelIds.png     label maps: 0..33,",
    "    or NAME_gtFine_labelTrainIds.png: 0..18, 255 = ignored",
)

_INSTANCE_IDS = "_gtFine_instanceIds.png"
_PREPARED_FROM = (
    "cityscapes/leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png          photographs",
    "cityscapes/gtFine/{train,val}/CITY/NAME_gtFine_instanceIds.png        instances, 16 bits",
)
_CATEGORIES = {entry["id"]: entry for entry in CITYSCAPES_CATEGORIES}


def cityscapes_roots(split: str) -> tuple[str, str]:
    """The folders of a split's photographs and label maps."""
    root = os.path.join(datasets_root(), "cityscapes")
    return os.path.join(root, "leftImg8bit", split), os.path.join(root, "gtFine", split)


def load_cityscapes(split: str) -> list[dict[str, Any]]:
    """The dicts of one of ``SPLITS``; those with raw label ids name the label map for them.

    Raises:
        DataError: the files are not where they should be, or do not pair up.
    """
    image_root, label_root = cityscapes_roots(split)
    hint = layout_hint(_LAYOUT)
    images = find_files(image_root, _IMAGE, "images", hint)
    labels = find_files(
        label_root, (_TRAIN_IDS, _LABEL_IDS), "label maps", hint, first_suffix_wins=True
    )
    records = pair_files(images, labels, image_root, label_root, hint=hint)
    for record in records:
        if record["sem_seg_file_name"].endswith(_LABEL_IDS):
            record["label_map"] = LABEL_MAP
    return records


def image_name(stem: str) -> str:
    """The file of the image "CITY_SEQUENCE_FRAME", relative to the folder of its split."""
    return f"{stem.partition('_')[0]}/{stem}{_IMAGE}"


def _instance_paths(split: str) -> dict[str, str]:
    image_root, label_root = cityscapes_roots(split)
    file = instance_file(_prepared_root(), "cityscapes", split)
    return {"image_root": image_root, "gt_dir": label_root, **file}


def _panoptic_paths(split: str) -> dict[str, str]:
    image_root, label_root = cityscapes_roots(split)
    files = panoptic_files(_prepared_root(), "cityscapes", split)
    return {"image_root": image_root, "gt_dir": label_root, **files}


def prepared_paths(split: str) -> dict[str, str]:
    """What `semask prepare cityscapes` writes: files of instances, of segments, and their maps."""
    root = _prepared_root()
    return instance_file(root, "cityscapes", split) | panoptic_files(root, "cityscapes", split)


def _prepared_root() -> str:
    return os.path.join(datasets_root(), "cityscapes", "gtFine")


def _load_panoptic(paths: Mapping[str, str], name: str, hint: str) -> list[dict[str, Any]]:
    """The dataset's own scripts write file names of images that do not exist; the ids are right."""
    records = load_segments(paths, name, hint)
    for record in records:
        record["file_name"] = os.path.join(paths["image_root"], image_name(record["image_id"]))
    return records


def register_cityscapes() -> None:
    """Register ``cityscapes_{raw_sem_seg,instance,panoptic}_{train,val}``, and test images."""
    # Of the ids 0 to 33, those that are no class of the benchmark are ignored.
    train_ids = dict.fromkeys(range(34), 255)
    train_ids.update({entry["id"]: entry["trainId"] for entry in CITYSCAPES_CATEGORIES})
    register_label_map(LABEL_MAP, train_ids)
    for split in SPLITS:
        register_sem_seg(
            f"cityscapes_raw_sem_seg_{split}",
            partial(load_cityscapes, split),
            CLASSES,
            COLORS,
            roots=partial(cityscapes_roots, split),
        )
    things = {entry["id"]: entry["trainId"] for entry in _THINGS}
    for split in PREPARED_SPLITS:
        register_prepared(
            f"cityscapes_instance_{split}",
            load_instances,
            partial(_instance_paths, split),
            evaluator_type="cityscapes_instance",
            thing_classes=[entry["name"] for entry in _THINGS],
            thing_colors=[entry["color"] for entry in _THINGS],
            thing_dataset_id_to_contiguous_id={given: i for i, given in enumerate(things)},
        )
        register_prepared(
            f"cityscapes_panoptic_{split}",
            _load_panoptic,
            partial(_panoptic_paths, split),
            evaluator_type="cityscapes_panoptic_seg",
            ignore_label=255,
            stuff_classes=list(CLASSES),
            stuff_colors=COLORS,
            thing_classes=[entry["name"] for entry in _THINGS],
            thing_dataset_id_to_contiguous_id=things,
            stuff_dataset_id_to_contiguous_id={
                entry["id"]: entry["trainId"] for entry in CITYSCAPES_CATEGORIES
            },
        )


def prepare_cityscapes(*, workers: int = 0, progress: Progress | None = None) -> list[Prepared]:
    """Write ``gtFine/cityscapes_{instance,panoptic}_{train,val}.json`` and the panoptic maps.

    Also write missing ``*_gtFine_labelTrainIds.png``, which Detectron2's own panoptic dataset
    needs. Labels that are not evaluated are in no segment; groups of things are crowds.

    Args:
        workers: number of worker processes; 0 = this process.
        progress: wraps the iteration over the images.

    Returns:
        What was written, and what was there, for each split.

    Raises:
        DataError: files are missing or unpaired, or have invalid values; or files of an earlier
            preparation are incomplete.
    """
    return [_prepare(split, workers, progress) for split in PREPARED_SPLITS]


def _prepare(split: str, workers: int, progress: Progress | None) -> Prepared:
    hint = layout_hint(_PREPARED_FROM)
    image_root, label_root = cityscapes_roots(split)
    images = find_files(image_root, "_leftImg8bit.png", "images", hint)
    labels = find_files(label_root, _INSTANCE_IDS, "maps of instances", hint)
    pair_files(images, labels, image_root, label_root, hint=hint)
    paths = prepared_paths(split)
    task = partial(_convert, label_root)
    categories = [
        {key: entry[key] for key in ("id", "name", "isthing", "color")}
        for entry in CITYSCAPES_CATEGORIES
    ]
    return prepare_split(
        split,
        task,
        sorted(images),
        categories,
        paths,
        image_name=image_name,
        map_name="{}_gtFine_panoptic.png".format,
        other_file=partial(_train_ids_file, label_root),
        workers=workers,
        progress=progress,
    )


def _train_ids_file(label_root: str, name: str) -> str:
    return os.path.join(label_root, name + _TRAIN_IDS)


def _convert(label_root: str, maps: str | None, name: str) -> Annotated:
    """Convert an image, named by its relative path without suffix, with its map in ``maps``."""
    path = os.path.join(label_root, name + _INSTANCE_IDS)
    with opened_image(path, "map of instances") as image:
        values = np.asarray(image).astype(np.int64)
    if values.ndim != 2 or values.min() < 0:
        raise DataError(f"'{path}' is not a map of instance ids: it has {values.ndim} dimensions.")
    labels = np.where(values >= 1000, values // 1000, values)
    segments = [
        Segment(
            value,
            category,
            thing=bool(_CATEGORIES[category]["isthing"]),
            crowd=bool(_CATEGORIES[category]["isthing"]) and value < 1000,
        )
        for value in np.unique(values).tolist()
        if (category := value // 1000 if value >= 1000 else value) in _CATEGORIES
    ]
    stem = os.path.basename(name)
    ids = np.where(np.isin(labels, list(_CATEGORIES)), values, 0)
    save_ids(maps, f"{stem}_gtFine_panoptic.png", ids)
    train_ids = _train_ids_file(label_root, name)
    if not os.path.exists(train_ids):
        table = np.full(int(labels.max()) + 1, 255, np.uint8)
        for category, entry in _CATEGORIES.items():
            table[category : category + 1] = entry["trainId"]
        with replacing(train_ids) as file:
            Image.fromarray(table[labels]).save(file, format="PNG")
    return describe_segments(stem, ids, segments)
