"""Names and colours of a model's classes, from the metadata of registered datasets."""

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from semask.data.datasets.coco_folder import category_ids
from semask.errors import DataError
from semask.modeling.architecture import detector_classes
from semask.utils.palette import class_colors

BACKGROUND_COLOR = (225, 225, 225)


def semantic_classes(cfg: CfgNode) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and (K, 3) uint8 RGB colours of the K classes of a semantic model.

    Those of the first dataset of ``DATASETS.TEST`` or ``DATASETS.TRAIN`` with K classes; if there
    is none, "class 0", ...
    """
    number = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name in MetadataCatalog.list():
            metadata = MetadataCatalog.get(name)
            names = metadata.get("stuff_classes", ())
            if len(names) == number:
                return tuple(names), class_colors(number, metadata.get("stuff_colors"))
    return tuple(f"class {index}" for index in range(number)), class_colors(number)


def categories(cfg: CfgNode, key: str) -> tuple[tuple[str, ...], tuple[int, ...], str]:
    """Names and ids of the categories of a model of instances, and their dataset ("" = none).

    Args:
        cfg: of the model.
        key: of the names in a dataset's metadata.

    Returns:
        Those of the first dataset of ``DATASETS.TEST`` or ``DATASETS.TRAIN`` with the model's
        number of categories; if there is none, "category 0", ... and 1, 2, ...
    """
    number = detector_classes(cfg)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name not in DatasetCatalog:
            continue
        metadata = MetadataCatalog.get(name)
        if not metadata.get(key):
            try:
                DatasetCatalog.get(name)  # loading it sets the metadata
            except DataError:
                continue
        names = metadata.get(key, ())
        if len(names) == number:
            return tuple(names), tuple(category_ids(metadata, number)), name
    names = tuple(f"category {index}" for index in range(number))
    return names, tuple(range(1, number + 1)), ""


def prior_classes_of(dataset_name: str, num_classes: int) -> tuple[list[str], np.ndarray]:
    """Names and colours of the classes of a detector's prior maps.

    Args:
        dataset_name: a registered dataset, or "".
        num_classes: K of the maps.

    Returns:
        K names, and (K, 3) uint8 RGB: those of the dataset's categories and the background, or of
        its semantic classes, if their number is K; else "class 0", ...
    """
    metadata = _metadata(dataset_name)
    things = list(metadata.get("thing_classes", ()))
    stuff = list(metadata.get("stuff_classes", ()))
    # If the semantic maps include the things, their classes supervise the priors.
    joint = len(stuff) == num_classes and set(things) <= set(stuff)
    if len(things) + 1 == num_classes and not joint:
        colors = category_colors(metadata, len(things))
        return [*things, "background"], np.concatenate([colors, [BACKGROUND_COLOR]]).astype(
            np.uint8
        )
    return stuff_classes_of(dataset_name, num_classes)


def stuff_classes_of(dataset_name: str, num_classes: int) -> tuple[list[str], np.ndarray]:
    """Names and colours of the classes of a dataset's semantic maps.

    Args:
        dataset_name: a registered dataset, or "".
        num_classes: K of the model.

    Returns:
        K names, and (K, 3) uint8 RGB: the dataset's, if it has K; else "class 0", ...
    """
    metadata = _metadata(dataset_name)
    names = list(metadata.get("stuff_classes", ()))
    if len(names) == num_classes:
        return names, class_colors(num_classes, metadata.get("stuff_colors"))
    return [f"class {index}" for index in range(num_classes)], class_colors(num_classes)


def _metadata(dataset_name: str) -> Any:
    return MetadataCatalog.get(dataset_name) if dataset_name else Metadata()


def category_colors(metadata: Any, number: int) -> np.ndarray:
    """(N, 3) uint8, RGB: the dataset's thing_colors, or a fixed palette if it has none."""
    colors = metadata.get("thing_colors")
    return class_colors(number, colors if colors and len(colors) == number else None)
