"""Cityscapes with fine annotations as its archives unpack: 19 classes, 2048 x 1024 pixels.

2,975 training, 500 validation and 1,525 test images: Cordts et al., arXiv 1604.01685. Label maps
are ``*_gtFine_labelTrainIds.png`` where these have been made with the dataset's own scripts, and
``*_gtFine_labelIds.png`` otherwise. The label maps of the test images are public only as blanks.

`semask prepare cityscapes` turns ``*_gtFine_instanceIds.png`` into the files for instance and
panoptic segmentation (:mod:`semask.data.preparation.cityscapes`). The panoptic ones are those of
the dataset's own scripts, so that Detectron2's ``cityscapes_fine_panoptic_*`` find them as well.
"""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

from semask.data.datasets.catalog import datasets_root, layout_hint, register_sem_seg
from semask.data.datasets.pairs import find_files, pair_files
from semask.data.datasets.prepared import (
    instance_file,
    load_instances,
    load_segments,
    panoptic_files,
    register_prepared,
)
from semask.data.reading import register_label_map

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
