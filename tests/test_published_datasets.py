"""ADE20K, Cityscapes and COCO-Stuff in the layouts that they are downloaded in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from PIL import Image

import tiny
from semask.config.loading import load_config
from semask.data.datasets.coco_stuff import NAMES
from semask.data.mappers.semantic import SemSegMapper
from semask.data.reading import check_label_values, read_label
from semask.engine import Trainer
from semask.errors import DataError, UnreadableError

# COCO's ids that no class has.
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
CLASSES = {"ade20k": 150, "cityscapes": 19, "coco_stuff": 171}
DATASETS = {
    "ade20k_raw_sem_seg": ("train", "val"),
    "cityscapes_raw_sem_seg": ("train", "val", "test"),
    "coco_stuff_10k_sem_seg": ("train", "test"),
    "coco_stuff_164k_sem_seg": ("train", "val"),
}
NAMES_OF_DATASETS = [f"{stem}_{split}" for stem, splits in DATASETS.items() for split in splits]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    return folder


@pytest.fixture
def samples(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shared / "data" / "samples"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    return folder


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photograph(path: Path, height: int = 24, width: int = 32) -> None:
    save(path, np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def labels(name: str) -> list[np.ndarray]:
    return [
        read_label(record["sem_seg_file_name"], record.get("label_map"))
        for record in DatasetCatalog.get(name)
    ]


def config(tmp_path: Path, name: str) -> CfgNode:
    classes = len(MetadataCatalog.get(name).stuff_classes)
    path = tiny.write_config(
        tmp_path / "config.yaml",
        DATASETS={"TRAIN": [name], "TEST": [name]},
        MODEL={"SEM_SEG_HEAD": {"NUM_CLASSES": classes}, "DEVICE": "cpu"},
        SOLVER={"MAX_ITER": 1},
        TEST={"NUM_PANELS": 0, "REPORT": False},
    )
    return load_config(path, ["OUTPUT_DIR", str(tmp_path / "out")])


def train_and_evaluate(tmp_path: Path, name: str) -> dict[str, Any]:
    """One step and one evaluation, of the whole set; the evaluation's report."""
    trainer = Trainer(config(tmp_path, name))
    trainer.resume_or_load(resume=False)
    trainer.train()
    file = tmp_path / "out" / "inference" / name / "sem_seg_evaluation.json"
    return json.loads(file.read_text())


# ---- all of them ----


@pytest.mark.parametrize("name", NAMES_OF_DATASETS)
def test_metadata(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    count = next(number for stem, number in CLASSES.items() if name.startswith(stem))
    assert len(metadata.stuff_classes) == len(set(metadata.stuff_classes)) == count
    assert np.array(metadata.stuff_colors).shape == (count, 3)
    assert (metadata.ignore_label, metadata.evaluator_type) == (255, "sem_seg")


def test_some_class_names() -> None:
    ade, city, stuff = (
        MetadataCatalog.get(f"{name}_train").stuff_classes
        for name in ("ade20k_raw_sem_seg", "cityscapes_raw_sem_seg", "coco_stuff_10k_sem_seg")
    )
    assert [ade[index] for index in (0, 6, 8, 149)] == ["wall", "road", "window", "flag"]
    assert [city[index] for index in (0, 8, 18)] == ["road", "vegetation", "bicycle"]
    assert [stuff[index] for index in (0, 79, 80, 170)] == [
        "person",
        "toothbrush",
        "banner",
        "wood",
    ]


@pytest.mark.parametrize("name", NAMES_OF_DATASETS)
def test_missing_files_say_where_they_belong(name: str, root: Path) -> None:
    with pytest.raises(DataError) as info:
        DatasetCatalog.get(name)
    text = str(info.value)
    assert str(root) in text
    assert "Expected there:" in text
    assert "photographs" in text
    assert text.endswith("set DETECTRON2_DATASETS to the folder that has them.")


# ---- ADE20K ----


def test_ade20k_labels(root: Path) -> None:
    raw = np.arange(151, dtype=np.uint8).reshape(1, 151)
    photograph(root / "ADEChallengeData2016/images/training/ADE_train_1.jpg", 1, 151)
    save(root / "ADEChallengeData2016/annotations/training/ADE_train_1.png", raw)
    (label,) = labels("ade20k_raw_sem_seg_train")
    assert label.tolist() == [[255, *range(150)]]


def test_ade20k_of_another_edition_is_refused(root: Path) -> None:
    photograph(root / "ADEChallengeData2016/images/training/a.jpg")
    path = root / "ADEChallengeData2016/annotations/training/a.png"
    save(path, np.full((24, 32), 151, np.uint8))
    with pytest.raises(DataError, match=r"'ade20k' is for 0\.\.150"):
        labels("ade20k_raw_sem_seg_train")


@pytest.mark.parametrize(
    ("name", "images"), [("ade20k_raw_sem_seg_val", 2), ("coco_stuff_164k_sem_seg_val", 4)]
)
def test_real_samples(samples: Path, tmp_path: Path, name: str, images: int) -> None:
    metadata = MetadataCatalog.get(name)
    found = labels(name)
    assert len(found) == images
    for label in found:
        check_label_values(label, len(metadata.stuff_classes), 255, name)
        assert len(np.unique(label)) > 3
    report = train_and_evaluate(tmp_path, name)
    pixels = np.array(report["confusion_matrix"]).sum(axis=0)
    expected = np.bincount(np.concatenate([label.ravel() for label in found]), minlength=256)
    assert pixels.tolist() == [*expected[: len(metadata.stuff_classes)].tolist(), expected[255]]


def test_what_the_real_samples_show(samples: Path) -> None:
    ade = MetadataCatalog.get("ade20k_raw_sem_seg_val").stuff_classes
    house = labels("ade20k_raw_sem_seg_val")[0]
    assert ade[np.bincount(house[:60].ravel(), minlength=256).argmax()] == "sky"
    assert ade[np.bincount(house[-60:].ravel(), minlength=256).argmax()] == "grass"
    stuff = MetadataCatalog.get("coco_stuff_164k_sem_seg_val").stuff_classes
    skier = labels("coco_stuff_164k_sem_seg_val")[1]
    counts = np.bincount(skier.ravel(), minlength=256)
    assert {stuff[index] for index in counts.argsort()[-2:]} == {"snow", "person"}
    assert counts[stuff.index("skis")] > 0


# ---- Cityscapes ----

# id: train id, from the dataset's own table.
CITYSCAPES = {
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9},
    **{23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
}


def cityscapes(root: Path, split: str, *kinds: str) -> tuple[Path, np.ndarray]:
    """Two cities with one image each, and label maps of these kinds; the raw ids."""
    folder = root / "cityscapes"
    raw = np.resize(np.arange(34, dtype=np.uint8), (24, 32))
    train_ids = np.array([CITYSCAPES.get(value, 255) for value in range(34)], np.uint8)[raw]
    for city in ("ulm", "bonn"):
        stem = f"{city}/{city}_000000_000019"
        photograph(folder / f"leftImg8bit/{split}/{stem}_leftImg8bit.png")
        for kind in kinds:
            pixels = train_ids if kind == "labelTrainIds" else raw
            save(folder / f"gtFine/{split}/{stem}_gtFine_{kind}.png", pixels)
    return folder, raw


@pytest.mark.parametrize(
    "kinds", [("labelIds",), ("labelTrainIds",), ("labelIds", "labelTrainIds")]
)
def test_cityscapes_labels(root: Path, kinds: tuple[str, ...]) -> None:
    folder, raw = cityscapes(root, "train", "instanceIds", "color", *kinds)
    records = DatasetCatalog.get("cityscapes_raw_sem_seg_train")
    assert [Path(record["file_name"]).parent.name for record in records] == ["bonn", "ulm"]
    for record in records:
        assert Path(record["sem_seg_file_name"]).is_relative_to(folder / "gtFine")
        assert record["sem_seg_file_name"].endswith(f"_gtFine_{kinds[-1]}.png")
    expected = [[CITYSCAPES.get(int(value), 255) for value in row] for row in raw]
    assert [label.tolist() for label in labels("cityscapes_raw_sem_seg_train")] == [expected] * 2


def test_cityscapes_with_train_ids_for_one_image_only(root: Path) -> None:
    folder, _ = cityscapes(root, "val", "labelIds")
    stem = folder / "gtFine/val/ulm/ulm_000000_000019"
    save(stem.with_name(stem.name + "_gtFine_labelTrainIds.png"), np.full((24, 32), 3, np.uint8))
    bonn, ulm = labels("cityscapes_raw_sem_seg_val")
    assert set(ulm.ravel().tolist()) == {3}
    assert set(bonn.ravel().tolist()) == {*range(19), 255}


def test_cityscapes_trains_and_evaluates(root: Path, tmp_path: Path) -> None:
    cityscapes(root, "train", "labelIds")
    report = train_and_evaluate(tmp_path, "cityscapes_raw_sem_seg_train")
    pixels = np.array(report["confusion_matrix"]).sum(axis=0)
    assert pixels.sum() == 2 * 24 * 32
    assert pixels[:19].min() > 0


# ---- COCO-Stuff ----


def test_coco_stuff_ids() -> None:
    assert list(NAMES) == [coco_id for coco_id in range(1, 183) if coco_id not in UNUSED]
    assert [NAMES[coco_id] for coco_id in (1, 13, 90, 92, 149, 182)] == [
        *("person", "stop sign", "toothbrush"),
        *("banner", "road", "wood"),
    ]


def in_order(value: int, *, in_png: bool) -> int:
    """The class of a raw value, counted afresh; 255 = unlabelled."""
    coco_id = value + 1 if in_png else value
    if value == (255 if in_png else 0):
        return 255
    return coco_id - 1 - sum(unused < coco_id for unused in UNUSED)


def test_coco_stuff_164k_labels(root: Path) -> None:
    folder = root / "coco_stuff164k"
    raw = [value for value in range(182) if value + 1 not in UNUSED] + [255]
    photograph(folder / "images/train2017/000000000009.jpg", 1, len(raw))
    save(folder / "annotations/train2017/000000000009.png", np.array([raw], np.uint8))
    # What other tools leave there does not disturb.
    save(folder / "annotations/train2017/000000000009_labelTrainIds.png", np.zeros((2, 2), "u1"))
    (label,) = labels("coco_stuff_164k_sem_seg_train")
    assert label.tolist() == [[in_order(value, in_png=True) for value in raw]]
    assert label.tolist() == [[*range(171), 255]]


@pytest.mark.parametrize("value", [11, 90, 182, 254])
def test_coco_stuff_164k_value_that_does_not_exist(root: Path, value: int) -> None:
    folder = root / "coco_stuff164k"
    photograph(folder / "images/val2017/a.jpg")
    save(folder / "annotations/val2017/a.png", np.full((24, 32), value, np.uint8))
    with pytest.raises(DataError, match=rf"a\.png' has raw values .*: {value} \(768 pixels\)"):
        labels("coco_stuff_164k_sem_seg_val")


def coco_stuff_10k(root: Path, *, names: str = "ab", listed: str = "a\nb\n") -> Path:
    folder = root / "cocostuff-10k-v1.1"
    (folder / "annotations").mkdir(parents=True)
    (folder / "imageLists").mkdir()
    raw = [value for value in range(183) if value not in UNUSED]
    for name in names:
        photograph(folder / f"images/{name}.jpg", 1, len(raw))
        contents = {"S": np.array([raw], np.uint16), "captions": np.array(["a", "b"], object)}
        scipy.io.savemat(folder / f"annotations/{name}.mat", contents, do_compression=True)
    (folder / "imageLists/train.txt").write_text(listed)
    (folder / "imageLists/test.txt").write_text("b\r\n\r\n")
    return folder


def test_coco_stuff_10k_labels(root: Path, tmp_path: Path) -> None:
    coco_stuff_10k(root)
    records = DatasetCatalog.get("coco_stuff_10k_sem_seg_train")
    assert [Path(record["file_name"]).name for record in records] == ["a.jpg", "b.jpg"]
    assert len(DatasetCatalog.get("coco_stuff_10k_sem_seg_test")) == 1
    for label in labels("coco_stuff_10k_sem_seg_train"):
        assert label.tolist() == [[255, *range(171)]]
    report = train_and_evaluate(tmp_path, "coco_stuff_10k_sem_seg_test")
    assert np.array(report["confusion_matrix"]).sum(axis=0).tolist() == [1] * 172


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("a\nc\n", "train.txt' lists 1 images that are not there, the first of them 'c'"),
        ("", "train.txt' is empty"),
        (None, "Cannot read the list of images"),
    ],
)
def test_coco_stuff_10k_lists(root: Path, listed: str | None, message: str) -> None:
    folder = coco_stuff_10k(root, listed=listed or "")
    if listed is None:
        (folder / "imageLists/train.txt").unlink()
    with pytest.raises(DataError, match=message) as info:
        DatasetCatalog.get("coco_stuff_10k_sem_seg_train")
    assert "cocostuff-10k-v1.1/imageLists" in str(info.value)


def test_coco_stuff_10k_with_a_missing_label(root: Path) -> None:
    folder = coco_stuff_10k(root)
    (folder / "annotations/b.mat").unlink()
    with pytest.raises(DataError, match=r"1 \(b\) in '.*images'"):
        DatasetCatalog.get("coco_stuff_10k_sem_seg_train")


# ---- MATLAB files ----


def mat(path: Path, **arrays: Any) -> Path:
    scipy.io.savemat(path, arrays)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64])
def test_matlab_label(tmp_path: Path, dtype: type) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7))
    label = read_label(mat(tmp_path / "a.mat", S=values.astype(dtype), other=np.eye(3)))
    assert label.dtype == np.uint8
    assert np.array_equal(label, values)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.eye(3), "names": np.eye(2)}, "no array 'S' but labels, names"),
        ({}, "no array 'S' but nothing at all"),
        ({"S": np.full((2, 2), 0.5)}, "not integers"),
        ({"S": np.full((2, 2), np.nan)}, "not integers"),
        ({"S": np.zeros((2, 2, 3))}, r"shape \(2, 2, 3\)"),
        ({"S": "text"}, "matrix of integers"),
        ({"S": np.full((2, 2), 300)}, r"from 300 to 300.*0\.\.255"),
        ({"S": np.full((2, 2), -1)}, r"from -1 to -1.*0\.\.255"),
    ],
)
def test_bad_matlab_label(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = mat(tmp_path / "a.mat", **arrays)
    with pytest.raises(DataError, match=message) as info:
        read_label(path)
    assert "a.mat" in str(info.value)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_matlab_files(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "a.mat"
    values = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    scipy.io.savemat(path, {"S": values}, do_compression=compressed)
    content = path.read_bytes()
    cut = [content[: len(content) * part // 20] for part in range(20)]
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + content[128:]
    for bad in (*cut, hdf5, b"not MATLAB at all"):
        path.write_bytes(bad)
        with pytest.raises(UnreadableError, match=r"a\.mat'.*damaged, incomplete"):
            read_label(path)
    with pytest.raises(UnreadableError, match=r"no label map '.*none\.mat'"):
        read_label(tmp_path / "none.mat")


# ---- in the layouts that Detectron2 registers, converted by its scripts ----


@pytest.fixture
def converted(root: Path) -> Iterator[Path]:
    """Detectron2's own registrations, as if it had been imported with this DETECTRON2_DATASETS."""
    catalogs = (DatasetCatalog, MetadataCatalog)
    kept = [dict(catalog.data) for catalog in catalogs]
    for catalog in catalogs:
        for name in [key for key in catalog if key.startswith(("ade20k_sem", "cityscapes_fine"))]:
            catalog.pop(name)
    builtin.register_all_ade20k(str(root))
    builtin.register_all_cityscapes(str(root))
    yield root
    for catalog, data in zip(catalogs, kept, strict=True):
        catalog.data.clear()
        catalog.data.update(data)


def test_detectron2s_ade20k(converted: Path, tmp_path: Path) -> None:
    folder = converted / "ADEChallengeData2016"
    photograph(folder / "images/validation/a.jpg", 10, 16)
    label = np.arange(160, dtype=np.uint8).reshape(10, 16)
    label[label >= 150] = 255
    save(folder / "annotations_detectron2/validation/a.png", label)
    report = train_and_evaluate(tmp_path, "ade20k_sem_seg_val")
    assert np.array(report["confusion_matrix"]).sum(axis=0).tolist() == [1] * 150 + [10]


def test_detectron2s_cityscapes(converted: Path, tmp_path: Path) -> None:
    folder, raw = cityscapes(converted, "val", "labelIds", "labelTrainIds", "instanceIds")
    for path in (folder / "gtFine").rglob("*_labelIds.png"):
        polygons = path.with_name(path.name.replace("labelIds.png", "polygons.json"))
        polygons.write_text(json.dumps({"imgHeight": 24, "imgWidth": 32, "objects": []}))
    name = "cityscapes_fine_sem_seg_val"
    mapper = SemSegMapper(is_train=True, augmentations=[], num_classes=19)
    samples = [mapper(record) for record in DatasetCatalog.get(name)]
    values = [set(sample["sem_seg"].unique().tolist()) for sample in samples]
    assert values == [{*range(19), 255}] * 2
    report = train_and_evaluate(tmp_path, name)
    expected = 2 * int(np.isin(raw, list(CITYSCAPES)).sum())
    assert np.array(report["confusion_matrix"])[:, :19].sum() == expected
