"""The formats, one file each; importing this package registers them."""

from semask.data.importers.formats import (
    coco,
    cvat,
    label_studio,
    labelme,
    masks,
    panoptic,
    supervisely,
    yolo,
)

__all__ = [
    "coco",
    "cvat",
    "label_studio",
    "labelme",
    "masks",
    "panoptic",
    "supervisely",
    "yolo",
]
