"""Ten small drawings with labels in every format, written by the formats' own programs."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "labels"

# Where each format has its images, below the folder of its labels.
IMAGE_FOLDERS = {
    "yolo": "images",
    "coco": "images",
    "labelme": ".",
    "cvat": "images",
    "masks": "JPEGImages",
    "panoptic": "images",
    "label_studio": "images",
    "supervisely": "ds0/img",
}


def _drawings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("label_drawings", FIXTURES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source(folder: Path, kind: str) -> Path:
    """A folder as after a user's export: the labels of a format, and the images."""
    root = folder / kind
    shutil.copytree(FIXTURES / kind, root)
    images = root / IMAGE_FOLDERS[kind]
    images.mkdir(parents=True, exist_ok=True)
    for path in (FIXTURES / "images").iterdir():
        shutil.copy(path, images)
    return root


def truth() -> dict[str, np.ndarray]:
    """The label map of each drawing: 0 background, 1 path, 2 bed, by the name of its image."""
    drawings = _drawings()
    maps = {}
    for index, name in enumerate(drawings.names()):
        labels = np.zeros((drawings.HEIGHT, drawings.WIDTH), np.uint8)
        for label, points in drawings.shapes(index):
            labels[drawings.mask(points)] = 1 + drawings.CLASSES.index(label)
        maps[name] = labels
    return maps
