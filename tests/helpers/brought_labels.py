"""Small folders of images and labels, as people bring them, and what is made of them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from semask.data.importers import Result
from semask.data.reading import read_label

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def label_maps(result: Result) -> dict[str, np.ndarray]:
    """The label maps that were written, by the stems of their names."""
    return {path.stem: read_label(path) for path in (result.folder / "annotations").rglob("*.png")}


def notes(result: Result) -> str:
    """The list of what was left out or changed."""
    return (result.folder / "import_notes.csv").read_text()


def write_pairs(
    folder: Path, maps: dict[str, np.ndarray], suffix: str = ".png", **options: Any
) -> Path:
    """images/NAME.png of noise, and masks/NAME of the given pixels."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, labels in maps.items():
        pixels = rng.integers(0, 256, (*labels.shape[:2], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        Image.fromarray(labels).save(folder / "masks" / f"{name}{suffix}", **options)
    return folder


def halves(*values: Any, side: int = 32) -> np.ndarray:
    """Columns of equal width, one for each value."""
    columns = np.repeat(np.arange(len(values)), side // len(values))
    return np.array(values, np.uint8)[np.tile(columns, (side, 1))]


def write_yolo(folder: Path, texts: dict[str, str], names: str = "[car, tree]") -> Path:
    """Images of 40 x 20 pixels and their label files; None has no file."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text(f"names: {names}\n")
    for name, text in texts.items():
        Image.fromarray(np.full((20, 40, 3), 90, np.uint8)).save(folder / "images" / f"{name}.png")
        (folder / "labels" / f"{name}.txt").write_text(text)
    return folder


LEFT = "0 0 0 0.5 0 0.5 1 0 1\n"  # the left half of the image is a car
