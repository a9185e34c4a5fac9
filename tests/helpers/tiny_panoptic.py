"""Panoptic maps in COCO's files, for the images of ``tiny_instances``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from semask.data.segments import panoptic_picture
from tiny_instances import CATEGORIES, SIDE, two_boxes, write_dataset

STUFF = [{"id": 10, "name": "grass"}, {"id": 11, "name": "sky"}]
IDS = {"thing_dataset_id_to_contiguous_id": {3: 0, 7: 1}}
IDS["stuff_dataset_id_to_contiguous_id"] = {0: 0, 10: 1, 11: 2}
# All classes as one series, as mask classification has them.
JOINT = {
    "thing_classes": ["light", "dark"],
    "stuff_classes": ["light", "dark", "grass", "sky"],
    "thing_dataset_id_to_contiguous_id": {3: 0, 7: 1},
    "stuff_dataset_id_to_contiguous_id": {3: 0, 7: 1, 10: 2, 11: 3},
}


def write_panoptic(
    folder: Path, maps: list[np.ndarray], segments: list[list[dict[str, Any]]]
) -> Path:
    """COCO's panoptic files of images 0.png, ...; the path of the JSON file."""
    (folder / "panoptic").mkdir(parents=True)
    categories = [{**c, "isthing": 1} for c in CATEGORIES] + [{**c, "isthing": 0} for c in STUFF]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for index, (ids, entries) in enumerate(zip(maps, segments, strict=True)):
        name = f"{index}.png"
        Image.fromarray(panoptic_picture(ids)).save(folder / "panoptic" / name)
        content["images"].append(
            {"id": index, "file_name": name, "height": ids.shape[0], "width": ids.shape[1]}
        )
        full = [
            {"bbox": [0, 0, 1, 1], "area": int((ids == entry["id"]).sum()), **entry}
            for entry in entries
        ]
        content["annotations"].append({"image_id": index, "file_name": name, "segments_info": full})
    path = folder / "panoptic.json"
    path.write_text(json.dumps(content))
    return path


def two_boxes_on_stuff() -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Ids and segments of ``two_boxes``, with grass above sky behind them and a strip left out."""
    ids = np.full((SIDE, SIDE), 1)
    ids[SIDE // 2 :] = 2
    ids[:3] = 0
    entries = [{"id": 1, "category_id": 10}, {"id": 2, "category_id": 11}]
    for number, annotation in enumerate(two_boxes(), start=3):
        x, y, w, h = annotation["bbox"]
        ids[y : y + h, x : x + w] = number
        entries.append({"id": number, "category_id": annotation["category_id"]})
    return ids, [{"iscrowd": 0, **entry} for entry in entries]


def register_joint(folder: Path, name: str = "own", number: int = 2) -> list[dict[str, Any]]:
    """Images with two boxes on stuff, in Detectron2's "standard" form; their dicts."""
    write_dataset(folder, [two_boxes()] * number)
    ids, entries = two_boxes_on_stuff()
    path = write_panoptic(folder, [ids] * number, [entries] * number)
    contiguous = JOINT["stuff_dataset_id_to_contiguous_id"]
    assert isinstance(contiguous, dict)
    records = [
        {
            "file_name": str(folder / "images" / f"{index}.png"),
            "image_id": index,
            "height": SIDE,
            "width": SIDE,
            "pan_seg_file_name": str(folder / "panoptic" / f"{index}.png"),
            "segments_info": [
                {
                    **entry,
                    "isthing": entry["category_id"] < 10,
                    "category_id": contiguous[entry["category_id"]],
                }
                for entry in entries
            ],
        }
        for index in range(number)
    ]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        panoptic_json=str(path),
        panoptic_root=str(folder / "panoptic"),
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        **JOINT,
    )
    return records
