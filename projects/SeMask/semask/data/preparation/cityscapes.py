"""Cityscapes' instances and segments from ``*_gtFine_instanceIds.png``, without its scripts.

A pixel's value is the label id (0..33) for stuff and for groups of unseparated objects, and for
instances 1000 times the label id plus the instance number. The panoptic files equal those that
``createPanopticImgs`` of the dataset's own scripts writes; segment ids are the pixel values.
"""

import os
from functools import partial

import numpy as np
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from PIL import Image

from semask.data.datasets.catalog import layout_hint
from semask.data.datasets.cityscapes import (
    PREPARED_SPLITS,
    cityscapes_roots,
    image_name,
    prepared_paths,
)
from semask.data.datasets.pairs import find_files, pair_files
from semask.data.image_files import opened_image
from semask.data.preparation.coco_files import (
    Annotated,
    Prepared,
    Progress,
    Segment,
    describe_segments,
    prepare_split,
    save_ids,
)
from semask.errors import DataError
from semask.utils.files import replacing

_INSTANCE_IDS, _TRAIN_IDS = "_gtFine_instanceIds.png", "_gtFine_labelTrainIds.png"
_LAYOUT = (
    "cityscapes/leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png          photographs",
    "cityscapes/gtFine/{train,val}/CITY/NAME_gtFine_instanceIds.png        instances, 16 bits",
)
_CATEGORIES = {entry["id"]: entry for entry in CITYSCAPES_CATEGORIES}


def prepare_cityscapes(*, workers: int = 0, progress: Progress | None = None) -> list[Prepared]:
    """Write ``gtFine/cityscapes_{instance,panoptic}_{train,val}.json`` and the panoptic maps.

    Also write missing ``*_gtFine_labelTrainIds.png``, which Detectron2's own panoptic dataset
    needs. Labels that are not evaluated are in no segment; groups of things are crowds.

    Args:
        workers: number of worker processes; 0 = this process.
        progress: wraps the iteration over the images.

    Returns:
        What was written for each split.

    Raises:
        DataError: files are missing or unpaired, or have invalid values.
    """
    return [_prepare(split, workers, progress) for split in PREPARED_SPLITS]


def _prepare(split: str, workers: int, progress: Progress | None) -> Prepared:
    hint = layout_hint(_LAYOUT)
    image_root, label_root = cityscapes_roots(split)
    images = find_files(image_root, "_leftImg8bit.png", "images", hint)
    labels = find_files(label_root, _INSTANCE_IDS, "maps of instances", hint)
    pair_files(images, labels, image_root, label_root, hint=hint)
    paths = prepared_paths(split)
    task = partial(_convert, label_root, paths["panoptic_root"])
    categories = [
        {key: entry[key] for key in ("id", "name", "isthing", "color")}
        for entry in CITYSCAPES_CATEGORIES
    ]
    return prepare_split(
        *(split, task, sorted(images), categories, paths),
        image_name=image_name,
        map_name="{}_gtFine_panoptic.png".format,
        workers=workers,
        progress=progress,
    )


def _convert(label_root: str, target: str, name: str) -> Annotated:
    """Convert an image, named by its relative path without suffix."""
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
    save_ids(os.path.join(target, f"{stem}_gtFine_panoptic.png"), ids)
    train_ids = os.path.join(label_root, name + _TRAIN_IDS)
    if not os.path.exists(train_ids):
        table = np.full(int(labels.max()) + 1, 255, np.uint8)
        for category, entry in _CATEGORIES.items():
            table[category : category + 1] = entry["trainId"]
        with replacing(train_ids) as file:
            Image.fromarray(table[labels]).save(file, format="PNG")
    return describe_segments(stem, ids, segments)
