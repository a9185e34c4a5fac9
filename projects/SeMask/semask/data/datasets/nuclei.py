"""Cell nuclei in microscope images with instance masks: 561 + 103 images, one category.

The 2018 Data Science Bowl (BBBC038): Caicedo et al., "Nucleus segmentation across imaging
experiments: the 2018 Data Science Bowl", Nature Methods 16 (2019). Public domain (CC0).
"""

import os
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.data.datasets.catalog import datasets_root, layout_hint, update_metadata
from semask.data.datasets.coco_folder import load_coco_folder

SPLITS = ("train", "val")
CLASSES = ["nucleus"]
_FOLDER = "nuclei_dsb2018"
_LAYOUT = (
    f"{_FOLDER}/images/{{train,val}}/NAME.jpg                  microscope images",
    f"{_FOLDER}/annotations/instances_{{train,val}}.json       outlines, in COCO's format",
)


def load_nuclei(split: str) -> list[dict[str, Any]]:
    """The dicts of one of ``SPLITS``.

    Raises:
        DataError: the annotation file is not where it should be, or cannot be used.
    """
    name = f"nuclei_instances_{split}"
    image_root, json_file = _paths(split)
    update_metadata(name, image_root=image_root, json_file=json_file)
    return load_coco_folder(json_file, image_root, name, hint=layout_hint(_LAYOUT))


def register_nuclei() -> None:
    """Register ``nuclei_instances_{train,val}``."""
    for split in SPLITS:
        name = f"nuclei_instances_{split}"
        if name in DatasetCatalog:
            continue
        DatasetCatalog.register(name, partial(load_nuclei, split))
        image_root, json_file = _paths(split)
        MetadataCatalog.get(name).set(
            image_root=image_root,
            json_file=json_file,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={1: 0},
        )


def _paths(split: str) -> tuple[str, str]:
    """The folder of a split's images, and its annotation file."""
    root = os.path.join(datasets_root(), _FOLDER)
    return (
        os.path.join(root, "images", split),
        os.path.join(root, "annotations", f"instances_{split}.json"),
    )
