"""The scenes with instances: things and stuff in COCO's panoptic format.

Made on first use from the label maps: suns, trees and bales of hay are things, one for each
connected component (8 neighbours) of at least ``MIN_AREA`` pixels. Smaller ones, crumbs behind
something nearer, belong to no segment; each other class of an image is one segment of stuff. So
trees that touch are one thing, and a tree that a bale cuts in two is two.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.data.datasets.catalog import datasets_root, update_metadata
from semask.data.datasets.panoptic_folder import load_panoptic_folder
from semask.data.datasets.prepared import write_ids
from semask.data.datasets.scenes.dataset import SEED, SPLITS, make_scenes
from semask.data.datasets.scenes.painting import CLASSES, HAY, SUN, TREE
from semask.data.datasets.scenes.render import GENERATOR_VERSION
from semask.data.reading import read_label
from semask.errors import DataError
from semask.utils.files import read_json, replacing

THINGS = (SUN, TREE, HAY)
MIN_AREA = 16
# Raised whenever a change here changes a pixel.
_VERSION = 1


def register_scenes_panoptic() -> None:
    """Register ``scenes_panoptic_{train,val}``."""
    for split in SPLITS:
        name = f"scenes_panoptic_{split}"
        if name in DatasetCatalog:
            continue
        DatasetCatalog.register(name, partial(_load, split))
        MetadataCatalog.get(name).set(
            evaluator_type="coco_panoptic_seg", ignore_label=255, **_paths(split)
        )


def make_panoptic_scenes(folder: str, splits: Mapping[str, int] = SPLITS) -> None:
    """See to it that the panoptic maps and their JSON files are in the folder of the scenes.

    Each file appears whole and the JSON file last, so several processes may do this at once.

    Args:
        folder: of the scenes, which are drawn if they are not there.
        splits: number of images of each split.

    Raises:
        DataError: the files cannot be written.
    """
    for split, scenes in make_scenes(folder, splits).items():
        maps = os.path.join(folder, f"panoptic_{split}")
        json_file = f"{maps}.json"
        info = {
            "generator_version": GENERATOR_VERSION,
            "seed": SEED,
            "panoptic_version": _VERSION,
            "images": len(scenes),
        }
        names = [os.path.basename(scene["file_name"]) for scene in scenes]
        if _info(json_file) == info and _all_there(maps, names):
            continue
        try:
            content = {"info": info, **_make_split(maps, scenes)}
            with replacing(json_file) as file:
                file.write(json.dumps(content).encode())
        except OSError as error:
            raise DataError(
                f"Cannot write the panoptic maps of the scenes into '{os.path.abspath(folder)}': "
                f"{error}. Set the environment variable DETECTRON2_DATASETS to a folder that can "
                "be written to."
            ) from error


def panoptic_map(label: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """The segments of a label map.

    Args:
        label: (H, W) uint8, indices of ``CLASSES``.

    Returns:
        (H, W) int32 with the id of each pixel's segment, 0 = none; and the class of each id.
    """
    ids = np.zeros(label.shape, np.int32)
    classes: dict[int, int] = {}
    for index in np.unique(label).tolist():
        mask = label == index
        if index not in THINGS:
            classes[len(classes) + 1] = index
            ids[mask] = len(classes)
            continue
        _, parts, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        for part, area in enumerate(statistics[:, cv2.CC_STAT_AREA].tolist()):
            if part > 0 and area >= MIN_AREA:  # 0 is what lies outside
                classes[len(classes) + 1] = index
                ids[parts == part] = len(classes)
    return ids, classes


def _load(split: str) -> list[dict[str, Any]]:
    folder = os.path.join(datasets_root(), "scenes")
    make_panoptic_scenes(folder)
    name, paths = f"scenes_panoptic_{split}", _paths(split)
    update_metadata(name, **paths)
    return load_panoptic_folder(
        paths["panoptic_json"], paths["image_root"], paths["panoptic_root"], name
    )


def _paths(split: str) -> dict[str, str]:
    folder = os.path.join(datasets_root(), "scenes")
    return {
        "image_root": os.path.join(folder, "images", split),
        "panoptic_root": os.path.join(folder, f"panoptic_{split}"),
        "panoptic_json": os.path.join(folder, f"panoptic_{split}.json"),
    }


def _info(json_file: str) -> Any:
    """What a finished file says about itself; None where there is none."""
    try:
        return read_json(json_file)["info"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _all_there(folder: str, names: list[str]) -> bool:
    return os.path.isdir(folder) and set(names) <= set(os.listdir(folder))


def _make_split(folder: str, scenes: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Write the PNG files of a split; returns what the JSON file lists."""
    images, annotations = [], []
    for number, scene in enumerate(scenes):
        name = os.path.basename(scene["file_name"])
        ids, classes = panoptic_map(read_label(scene["sem_seg_file_name"]))
        write_ids(os.path.join(folder, name), ids)
        areas = np.bincount(ids.ravel(), minlength=len(classes) + 1).tolist()
        size = {key: scene[key] for key in ("height", "width")}
        images.append({"id": number, "file_name": name, **size})
        segments = [
            {"id": segment, "category_id": index + 1, "iscrowd": 0, "area": areas[segment]}
            for segment, index in classes.items()
        ]
        annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
    categories = [
        {"id": index + 1, "name": name, "isthing": int(index in THINGS)}
        for index, name in enumerate(CLASSES)
    ]
    return {"images": images, "categories": categories, "annotations": annotations}
