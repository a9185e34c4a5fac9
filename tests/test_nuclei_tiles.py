"""Tiles of the nuclei dataset: each pixel of an instance in the tile that has it."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from benchmarks import nuclei_tiles
from PIL import Image


def box(image: int, left: int, top: int, width: int, height: int) -> dict[str, object]:
    right, bottom = left + width, top + height
    polygon = [left, top, right, top, right, bottom, left, bottom]
    return {"image_id": image, "category_id": 1, "segmentation": [polygon]}


def test_tiles_hold_the_middle_and_its_instances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "nuclei_dsb2018"
    (root / "images/val").mkdir(parents=True)
    (root / "annotations").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "images/val/a.png")
    Image.fromarray(pixels[:40, :50]).save(root / "images/val/b.png")
    images = [
        {"id": 3, "file_name": "a.png", "height": 100, "width": 120},
        {"id": 4, "file_name": "b.png", "height": 40, "width": 50},
    ]
    # In the middle of a, at its border, and where one column reaches into the tiles on the right.
    annotations = [box(3, 50, 40, 20, 20), box(3, 0, 0, 15, 5), box(3, 55, 20, 6, 5)]
    annotations += [box(4, 10, 10, 8, 8)]
    content = {"images": images, "annotations": annotations}
    (root / "annotations/instances_val.json").write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert nuclei_tiles.main([str(tmp_path / "tiles"), "--side", "32"]) == 0
    found = json.loads((tmp_path / "tiles/annotations/val.json").read_text())
    corners = {(18, 28): 0, (18, 60): 1, (50, 28): 2, (50, 60): 3}
    names = [entry["file_name"] for entry in found["images"]]
    assert names == [f"a_{top}_{left}.png" for top, left in corners] + ["b_4_9.png"]
    for top, left in corners:
        tile = np.asarray(Image.open(tmp_path / f"tiles/images/val/a_{top}_{left}.png"))
        np.testing.assert_array_equal(tile, pixels[top : top + 32, left : left + 32])
    of_a = [entry for entry in found["annotations"] if entry["image_id"] < 5]
    assert sum(entry["area"] for entry in of_a) == 20 * 20 + 6 * 5
    assert [entry["area"] for entry in of_a if entry["iscrowd"]] == [5]
    (of_b,) = (entry for entry in found["annotations"] if entry["image_id"] == 5)
    assert of_b["bbox"] == [1, 6, 8, 8]
    assert mask_util.decode(of_b["segmentation"]).sum() == 64


def test_without_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert nuclei_tiles.main([str(tmp_path / "tiles")]) == 2
    assert not (tmp_path / "tiles").exists()
