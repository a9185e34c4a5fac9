"""A few generated images with instances in COCO's format, and the smallest detectors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 64
CATEGORIES = [{"id": 3, "name": "light"}, {"id": 7, "name": "dark"}]

# Makes any shipped detector small enough for a test.
SMALL_MODEL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": [1, 1, 1, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 1, 2, 2],
    "MODEL.SWIN.WINDOW_SIZE": 4,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.RETINANET.NUM_CLASSES": 2,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
}

Annotations = list[dict[str, Any]]


def flat(overrides: dict[str, Any]) -> list[Any]:
    """``KEY, VALUE, ...`` for ``load_config``, or with ``str`` of each for a command line."""
    return [part for pair in overrides.items() for part in pair]


def box_polygon(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def box_annotation(x: float, y: float, w: float, h: float, category: int = 3) -> dict[str, Any]:
    """An annotation of a rectangle, in COCO's format, without id and image_id."""
    return {
        "bbox": [x, y, w, h],
        "segmentation": [box_polygon(x, y, w, h)],
        "area": w * h,
        "iscrowd": 0,
        "category_id": category,
    }


def write_dataset(
    folder: Path, annotations: list[Annotations], name: str = "instances.json"
) -> Path:
    """Images ``images/0.png``, ... with these annotations; the path of the annotation file.

    Each annotation's rectangle is bright or dark on grey ground.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number, entries in enumerate(annotations):
        pixels = rng.integers(100, 140, (SIDE, SIDE, 3), dtype=np.uint8)
        for entry in entries:
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": number, **entry}
            )
            x, y, w, h = (int(value) for value in entry.get("bbox", (0, 0, 0, 0)))
            pixels[max(y, 0) : y + h, max(x, 0) : x + w] = 230 if entry["category_id"] == 3 else 20
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        image = {"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE}
        content["images"].append(image)
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def two_boxes() -> Annotations:
    return [box_annotation(4, 6, 20, 24), box_annotation(36, 30, 16, 20, category=7)]
