"""`semask import`: labels of every format, as its program writes them, up to a trained model."""

import base64
import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest

import label_sources
from brought_labels import (
    label_maps,
    notes,
)
from semask.cli import main
from semask.data.datasets.coco_folder import load_coco_folder
from semask.data.importers import FORMATS, Options, convert_labels
from semask.data.reading import read_image
from semask.errors import ConfigError

KINDS = list(label_sources.IMAGE_FOLDERS)


# ---- every format, as its own program writes it


def test_every_format_has_a_sample() -> None:
    titles = {name.replace("coco-", "").replace("-", "_") for name in FORMATS}
    assert titles == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_label_maps(tmp_path: Path, kind: str) -> None:
    root = label_sources.source(tmp_path, kind)
    result = convert_labels(root, tmp_path / "out", Options(layout="folder"))
    assert result.images == {"train": 8, "val": 2}
    assert "left out" not in notes(result)
    classes = ["background", "path", "bed"]
    if kind == "panoptic":  # Pixels of no segment do not count.
        classes = classes[1:]
    assert sorted(result.classes) == sorted(classes)
    values = np.array(
        [
            result.classes.index(name) if name in result.classes else 255
            for name in ("background", "path", "bed")
        ],
        np.uint8,
    )
    exact = kind in ("masks", "panoptic")
    maps = label_maps(result)
    for name, expected in label_sources.truth().items():
        # Programs differ in the pixels that a polygon's edge has.
        assert (maps[name] != values[expected]).mean() <= (0 if exact else 0.03), name
        (image,) = (result.folder / "images").rglob(f"{name}.jpg")
        assert image.read_bytes() == (label_sources.FIXTURES / "images" / image.name).read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "masks"])
def test_instances(tmp_path: Path, kind: str) -> None:
    root = label_sources.source(tmp_path, kind)
    result = convert_labels(root, tmp_path / "out", Options(layout="coco", val=0.3))
    counts = {name: (images, instances) for name, images, instances in result.counts}
    assert counts == {"path": (10, 10), "bed": (10, 15)}
    folder = result.folder
    truth = label_sources.truth()
    for part in ("train", "val"):
        path = folder / "annotations" / f"instances_{part}.json"
        records = load_coco_folder(str(path), str(folder / "images" / part))
        for record in records:
            assert read_image(record["file_name"]).shape == (72, 96, 3)
            beds = [a for a in record["annotations"] if result.classes[a["category_id"]] == "bed"]
            painted = np.zeros((72, 96), bool)
            for annotation in beds:
                segmentation = annotation["segmentation"]
                if isinstance(segmentation, list):
                    segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, 72, 96))
                painted |= mask_util.decode(segmentation).astype(bool)
            expected = truth[Path(record["file_name"]).stem] == 2
            assert (painted != expected).mean() < 0.02


def test_label_maps_have_no_instances(tmp_path: Path) -> None:
    root = label_sources.source(tmp_path, "masks")
    with pytest.raises(ConfigError, match="--to folder"):
        convert_labels(root, tmp_path / "out", Options(layout="coco"))
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks"]


def test_the_part_of_each_image_is_kept_or_chosen_by_name(tmp_path: Path) -> None:
    chosen = []
    for name in ("a", "b"):
        root = label_sources.source(tmp_path / name, "labelme")
        result = convert_labels(root, tmp_path / name / "out", Options(seed=3, val=0.4))
        rows = list(csv.reader((result.folder / "split.csv").open()))[1:]
        chosen.append({Path(row[1]).name: row[0] for row in rows})
        assert all(Path(row[2]).is_file() and Path(row[3]).is_file() for row in rows)
    assert chosen[0] == chosen[1]
    assert sorted(chosen[0].values()) == ["train"] * 6 + ["val"] * 4
    root = label_sources.source(tmp_path / "c", "masks")
    sets = root / "ImageSets" / "Segmentation"
    names = (sets / "default.txt").read_text().split()
    (sets / "train.txt").write_text("\n".join(names[:7]))
    (sets / "val.txt").write_text("\n".join(names[7:]))
    result = convert_labels(root, tmp_path / "c" / "out")
    assert sorted(path.stem for path in (result.folder / "images" / "val").iterdir()) == names[7:]


# ---- other layouts of the same formats


def roboflow(tmp_path: Path) -> Path:
    """COCO as Roboflow exports it: files beside the images, a parent that is a category."""
    root = tmp_path / "roboflow"
    given = label_sources.source(tmp_path, "coco")
    content = json.loads((given / "annotations" / "instances_default.json").read_text())
    for part, numbers in (("train", range(1, 7)), ("valid", range(7, 11))):
        folder = root / part
        folder.mkdir(parents=True)
        images = [entry for entry in content["images"] if entry["id"] in numbers]
        for entry in images:
            (given / "images" / entry["file_name"]).rename(folder / entry["file_name"])
        categories = [{"id": 0, "name": "garden", "supercategory": "none"}] + [
            {**entry, "supercategory": "garden"} for entry in content["categories"]
        ]
        annotations = [a for a in content["annotations"] if a["image_id"] in numbers]
        parts = {"images": images, "categories": categories, "annotations": annotations}
        (folder / "_annotations.coco.json").write_text(json.dumps(parts))
    return root


def roboflow_yolo(tmp_path: Path) -> Path:
    """YOLO as Roboflow exports it: train/images and train/labels, and ../train in data.yaml."""
    root = label_sources.source(tmp_path, "yolo")
    for part, numbers in (("train", "012345"), ("valid", "6789")):
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            (root / part / kind).mkdir(parents=True)
            for number in numbers:
                name = f"garden_{number}.{suffix}"
                (root / kind / name).rename(root / part / kind / name)
    text = "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['path', 'bed']\n"
    (root / "data.yaml").write_text(text)
    return root


def labelme_with_pixels(tmp_path: Path) -> Path:
    """LabelMe's files alone, with the images inside, one made of other shapes."""
    root = label_sources.source(tmp_path, "labelme")
    for path in root.glob("*.json"):
        content = json.loads(path.read_text())
        image = root / content["imagePath"]
        content["imageData"] = base64.b64encode(image.read_bytes()).decode()
        image.unlink()
        path.write_text(json.dumps(content))
    return root


def label_studio_min(tmp_path: Path) -> Path:
    """Label Studio's JSON_MIN."""
    root = label_sources.source(tmp_path, "label_studio")
    path = root / "project-1.json"
    tasks = []
    for task in json.loads(path.read_text()):
        values = [
            {**result["value"], "original_width": 96, "original_height": 72}
            for result in task["annotations"][0]["result"]
        ]
        tasks.append({"image": task["data"]["image"], "id": task["id"], "tag": values})
    path.write_text(json.dumps(tasks))
    return root


@pytest.mark.parametrize("make", [roboflow, roboflow_yolo, labelme_with_pixels, label_studio_min])
def test_other_layouts(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    result = convert_labels(make(tmp_path), tmp_path / "out", Options(layout="folder"))
    assert sorted(result.classes) == ["background", "bed", "path"]
    assert sum(result.images.values()) == 10
    if "roboflow" in make.__name__:
        assert result.images == {"train": 6, "val": 4}
    order = np.array([result.classes.index(name) for name in ("background", "path", "bed")])
    maps = label_maps(result)
    for name, expected in label_sources.truth().items():
        assert (maps[name] != order[expected]).mean() <= 0.03, name


# ---- from a folder of labels to a trained model


@pytest.mark.parametrize("kind", ["yolo", "labelme", "cvat", "masks", "coco"])
def test_from_labels_to_a_report_with_the_printed_commands(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label_sources.source(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    assert main.main(["import", kind, "--output", "garden"]) == 0
    printed = capsys.readouterr().out
    assert "10 images (8 train, 2 val)" in printed
    assert "No problems." in printed
    look, train, _ = (
        shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("  semask ")
    )
    assert printed.splitlines()[-1].startswith("  semask train ")
    assert main.main(look) == 0
    assert list(Path("garden").glob("samples*.png"))
    small = ["SOLVER.MAX_ITER=2", "SOLVER.IMS_PER_BATCH=2", "TEST.EVAL_PERIOD=0"]
    small += ["MODEL.DEVICE=cpu", "DATALOADER.NUM_WORKERS=0", "SOLVER.WARMUP_ITERS=0"]
    small += ["MODEL.SWIN.EMBED_DIM=8", "OUTPUT_DIR=run"]
    small += ["INPUT.MIN_SIZE_TRAIN=(64,)"] if kind == "coco" else ["INPUT.CROP.SIZE=[64, 64]"]
    assert main.main([*train, *small]) == 0
    assert Path("run/model_final.pth").is_file()
    (report,) = Path("run/inference").glob("*/report.html")
    assert "bed" in report.read_text()
