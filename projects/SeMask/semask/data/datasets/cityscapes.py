"""Cityscapes with fine annotations as its archives unpack: 19 classes, 2048 x 1024 pixels.

2,975 training, 500 validation and 1,525 test images: Cordts et al., arXiv 1604.01685. Label maps
are ``*_gtFine_labelTrainIds.png`` where these have been made with the dataset's own scripts, and
``*_gtFine_labelIds.png`` otherwise. The label maps of the test images are public only as blanks.
"""

import os
from functools import partial
from typing import Any

from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

from semask.data.datasets.catalog import datasets_root, layout_hint, register_sem_seg
from semask.data.datasets.pairs import find_files, pair_files
from semask.data.reading import register_label_map

LABEL_MAP = "cityscapes_label_ids"
SPLITS = ("train", "val", "test")
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


def register_cityscapes() -> None:
    """Register ``cityscapes_raw_sem_seg_{train,val,test}``."""
    # Of the ids 0 to 33, those that are no class of the benchmark are ignored.
    train_ids = dict.fromkeys(range(34), 255)
    train_ids.update({entry["id"]: entry["trainId"] for entry in CITYSCAPES_CATEGORIES})
    register_label_map(LABEL_MAP, train_ids)
    for split in SPLITS:
        register_sem_seg(
            f"cityscapes_raw_sem_seg_{split}",
            partial(load_cityscapes, split),
            [entry["name"] for entry in CITYSCAPES_CATEGORIES],
            [entry["color"] for entry in CITYSCAPES_CATEGORIES],
            roots=partial(cityscapes_roots, split),
        )
