"""The scenes as things and stuff: each pixel in the segment that its class and its place say."""

import json
from pathlib import Path

import numpy as np
import pytest

import semask  # noqa: F401  (also makes Detectron2 importable)

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog
from scipy import ndimage

from semask.data.datasets.scenes.dataset import make_scenes
from semask.data.datasets.scenes.painting import CLASSES, GRASS, HAY, SKY, SUN, TREE
from semask.data.datasets.scenes.panoptic import MIN_AREA, make_panoptic_scenes, panoptic_map
from semask.data.reading import read_image, read_label
from semask.data.segments import segment_ids

FEW = {"train": 3, "val": 2}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_panoptic_scenes(str(folder), FEW)
    return folder


def test_segments_of_a_drawing() -> None:
    label = np.full((40, 60), SKY, np.uint8)
    label[20:] = GRASS
    label[2:8, 2:8] = SUN
    label[2:8, 50:58] = SUN
    label[25:30, 10:15] = label[30:35, 15:20] = TREE  # touch at a corner: one thing
    label[25:35, 30:40] = TREE
    label[37, 40:44] = HAY  # a crumb
    ids, classes = panoptic_map(label)
    assert sorted(classes.values()) == sorted([SKY, GRASS, SUN, SUN, TREE, TREE])
    assert MIN_AREA > 4
    np.testing.assert_array_equal(ids == 0, label == HAY)
    for segment, index in classes.items():
        assert (label[ids == segment] == index).all()
    assert ids[27, 12] == ids[32, 17] != ids[27, 35]
    assert ids[3, 3] != ids[3, 52]
    assert len(np.unique(ids[label == GRASS])) == 1


@pytest.mark.parametrize("split", FEW)
def test_files_hold_the_components_of_the_label_maps(few: Path, split: str) -> None:
    content = json.loads((few / f"panoptic_{split}.json").read_text())
    things = {entry["id"] for entry in content["categories"] if entry["isthing"]}
    assert [entry["name"] for entry in content["categories"]] == CLASSES
    assert {CLASSES[number - 1] for number in things} == {"sun", "tree", "hay"}
    assert len(content["images"]) == len(content["annotations"]) == FEW[split]
    for entry in content["annotations"]:
        ids = segment_ids(read_image(few / f"panoptic_{split}" / entry["file_name"]))
        label = read_label(few / "annotations" / split / entry["file_name"])
        expected = set()
        for number, name in enumerate(CLASSES, start=1):
            mask = label == CLASSES.index(name)
            parts, count = ndimage.label(mask, np.ones((3, 3))) if number in things else (mask, 1)
            for part in range(1, count + 1):
                region = parts == part
                if region.sum() >= (MIN_AREA if number in things else 1):
                    (segment,) = np.unique(ids[region])
                    expected.add((segment, number, region.sum()))
        found = {(s["id"], s["category_id"], s["area"]) for s in entry["segments_info"]}
        assert found == expected


def test_lost_maps_are_made_again_and_others_left(few: Path) -> None:
    lost, kept = few / "panoptic_val/00001.png", few / "panoptic_train/00000.png"
    content, before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    make_panoptic_scenes(str(few), FEW)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == before


def test_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("semask.data.datasets.scenes.panoptic.make_scenes", few_scenes)
    records = DatasetCatalog.get("scenes_panoptic_val")
    metadata = MetadataCatalog.get("scenes_panoptic_val")
    assert len(records) == FEW["val"]
    assert metadata.stuff_classes == CLASSES
    assert metadata.thing_classes == ["sun", "tree", "hay"]
    assert Path(metadata.panoptic_json).parent == tmp_path / "scenes"
    assert all(Path(record["pan_seg_file_name"]).is_file() for record in records)


def few_scenes(folder: str, splits: dict[str, int]) -> dict[str, list[dict[str, object]]]:
    return make_scenes(folder, FEW)
