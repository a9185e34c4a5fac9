"""A small dataset of label maps, and its possible defects."""

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from semask.data import register_folder

CLASSES = ["sky", "grass", "tree", "snow"]
IMAGES = 5


def write_folder(tmp_path: Path) -> Path:
    """The dataset "own", without fault: 5 images of 8 x 6 pixels; the class "snow" is nowhere."""
    for kind in ("images", "annotations"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        image = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        label = np.zeros((6, 8), np.uint8)
        label[:, 4:] = 1
        label[0] = 255
        if index == 2:
            label[5] = 2
        Image.fromarray(image).save(tmp_path / f"data/images/{index}.png")
        Image.fromarray(label).save(tmp_path / f"data/annotations/{index}.png")
    register_folder("own", tmp_path / "data/images", tmp_path / "data/annotations", CLASSES)
    return tmp_path / "data"


# ---- what can be wrong ----


def remove_label(folder: Path) -> None:
    (folder / "annotations/1.png").unlink()


def remove_image(folder: Path) -> None:
    (folder / "images/1.png").unlink()


def truncate_image(folder: Path) -> None:
    path = folder / "images/1.png"
    path.write_bytes(path.read_bytes()[:-30])


def empty_label(folder: Path) -> None:
    (folder / "annotations/1.png").write_bytes(b"")


def resize_label(folder: Path) -> None:
    Image.fromarray(np.zeros((8, 6), np.uint8)).save(folder / "annotations/1.png")


def break_value(folder: Path) -> None:
    Image.fromarray(np.full((6, 8), 4, np.uint8)).save(folder / "annotations/1.png")


def colour_label(folder: Path) -> None:
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(folder / "annotations/1.png")


def float_image(folder: Path) -> None:
    (folder / "images/1.png").unlink()
    cv2.imwrite(str(folder / "images/1.tif"), np.zeros((6, 8), np.float32))


def ignore_everything(folder: Path) -> None:
    for path in (folder / "annotations").iterdir():
        Image.fromarray(np.full((6, 8), 255, np.uint8)).save(path)


def remove_everything(folder: Path) -> None:
    shutil.rmtree(folder)


def add_twin(folder: Path) -> None:
    shutil.copy(folder / "images/1.png", folder / "images/1.bmp")


DEFECTS: list[tuple[Callable[[Path], None], str, str, int]] = [
    (remove_label, "without counterpart", "1 (1) in '", 4),
    (remove_image, "without counterpart", "without an image", 4),
    (truncate_image, "unreadable", "Cannot read image '", 5),
    (empty_label, "unreadable", "Cannot read label map '", 5),
    (resize_label, "sizes differ", "is 8x6 pixels (width x height, upright) but", 5),
    (break_value, "unusable label map", "not classes: 4 (48 pixels)", 5),
    (colour_label, "unusable label map", "has 3 channels (RGB)", 5),
    (float_image, "unusable image", "32-bit pixels", 5),
    (ignore_everything, "nothing labelled", "No image of dataset 'own' has a labelled pixel", 5),
    (remove_everything, "cannot be listed", "There is no folder '", 0),
    (add_twin, "cannot be listed", "pairs are ambiguous", 0),
]
BY_DEFECT = pytest.mark.parametrize(
    ("damage", "kind", "words", "pairs"), DEFECTS, ids=[defect[0].__name__ for defect in DEFECTS]
)
