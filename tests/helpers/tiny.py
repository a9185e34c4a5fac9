"""A dataset of a few generated images and a config of the smallest SeMask, for whole runs."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger
from PIL import Image

CLASSES = ("ground", "left", "right")
SIDE = 40


def write_images(folder: Path, number: int) -> list[dict[str, Any]]:
    """Bright rectangles on dark ground, their half of the image decides their class."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for index in range(number):
        image = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        label = np.zeros((SIDE, SIDE), dtype=np.uint8)
        for class_id, start in ((1, 0), (2, SIDE // 2)):
            x, y = start + rng.integers(0, 8), rng.integers(0, 20)
            image[y : y + 16, x : x + 10] += 150
            label[y : y + 16, x : x + 10] = class_id
        label[:2] = 255
        record: dict[str, Any] = {
            "file_name": str(folder / f"{index}.png"),
            "sem_seg_file_name": str(folder / f"{index}_label.png"),
            "height": SIDE,
            "width": SIDE,
        }
        Image.fromarray(image).save(record["file_name"])
        Image.fromarray(label).save(record["sem_seg_file_name"])
        records.append(record)
    return records


def register(name: str, records: list[dict[str, Any]], **metadata: Any) -> None:
    DatasetCatalog.register(name, lambda: records)
    defaults = {"stuff_classes": list(CLASSES), "ignore_label": 255, "evaluator_type": "sem_seg"}
    MetadataCatalog.get(name).set(**{**defaults, **metadata})


def unregister(*names: str) -> None:
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


@contextlib.contextmanager
def datasets(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Register "tiny_train" (4 images) and "tiny_val" (2), in one thread; all their dicts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough to share
    records = write_images(folder / "images", 6)
    register("tiny_train", records[:4])
    register("tiny_val", records[4:])
    try:
        yield records
    finally:
        unregister("tiny_train", "tiny_val")
        torch.set_num_threads(threads)


@contextlib.contextmanager
def own_loggers() -> Iterator[None]:
    """Take back what Detectron2's ``setup_logger`` does to the loggers, for the next run."""
    try:
        yield
    finally:
        for name in ("detectron2", "fvcore", "semask"):
            logger = logging.getLogger(name)
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
            logger.propagate = True
            logger.setLevel(logging.NOTSET)
        setup_logger.cache_clear()


def tiny_config() -> dict[str, Any]:
    return {
        "MODEL": {
            "META_ARCHITECTURE": "SeMaskSegmentor",
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "BACKBONE": {"NAME": "SeMaskSwin"},
            "SWIN": {
                "EMBED_DIM": 8,
                "DEPTHS": [1, 1],
                "NUM_HEADS": [1, 2],
                "WINDOW_SIZE": 4,
                "OUT_FEATURES": ["res2", "res3"],
                "ACTIVATION_CHECKPOINT": [False, False],
            },
            "SEMASK": {"ATTENTION": ["window", "global"], "NUM_BLOCKS": [1, 1]},
            "SEM_SEG_HEAD": {
                "NAME": "SeMaskFPNHead",
                "IN_FEATURES": ["res2", "res3"],
                "CONVS_DIM": 8,
                "NUM_CLASSES": len(CLASSES),
                "NORM": "BN",
            },
        },
        "INPUT": {
            "FORMAT": "RGB",
            "SCALE": [SIDE, SIDE],
            "RANDOM_FLIP": "none",
            "CROP": {"ENABLED": True, "TYPE": "absolute", "SIZE": [32, 32]},
        },
        "DATASETS": {"TRAIN": ["tiny_train"], "TEST": ["tiny_val"]},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {
            "IMS_PER_BATCH": 2,
            "BASE_LR": 0.01,
            "MAX_ITER": 3,
            "LR_SCHEDULER_NAME": "WarmupPolyLR",
            "WARMUP_ITERS": 0,
            "STEPS": [],
        },
        "TEST": {"NUM_PANELS": 2},
        "SEED": 1,
        "VERSION": 2,
    }


def write_config(path: Path, **sections: Any) -> str:
    """``tiny_config`` as a file; a keyword adds to (or replaces keys of) a section, or is a key."""
    config = tiny_config()
    merge(config, sections)
    path.write_text(yaml.safe_dump(config))
    return str(path)


def merge(target: dict[str, Any], values: dict[str, Any]) -> None:
    """Add to (or replace keys of) nested sections, in place."""
    for key, value in values.items():
        if isinstance(value, dict):
            merge(target.setdefault(key, {}), value)
        else:
            target[key] = value
