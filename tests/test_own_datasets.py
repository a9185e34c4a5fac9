"""Own datasets: in a line of Python, and from a config alone."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_net
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import tiny
from semask import config_path, load_config
from semask.cli.predict import find_inputs
from semask.data import reading, register_config_folders, register_folder
from semask.data.datasets.pairs import find_files
from semask.data.importers.files import ImageFiles
from semask.data.reading import read_label
from semask.engine import Trainer
from semask.errors import ConfigError, DataError
from semask.inference.predictor import image_files

CLASSES = ["sky", "grass", "tree"]


@pytest.fixture(autouse=True)
def catalogs() -> Iterator[None]:
    """Whatever a test registers is gone after it."""
    tables = (DatasetCatalog.data, MetadataCatalog.data, reading.LABEL_MAPS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def write(folder: Path, *names: str, height: int = 40, width: int = 48, classes: int = 3) -> None:
    """Pairs ``images/NAME`` and ``annotations/NAME.png``, of noise with some ignored pixels."""
    rng = np.random.default_rng(0)
    for name in names:
        image = folder / "images" / name
        label = (folder / "annotations" / name).with_suffix(".png")
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
        classes_and_ignored = rng.choice([*range(classes), 255], (height, width)).astype(np.uint8)
        Image.fromarray(classes_and_ignored).save(label)


def register(folder: Path, name: str = "own", **options: Any) -> None:
    options.setdefault("classes", CLASSES)
    register_folder(name, folder / "images", folder / "annotations", **options)


def stems(name: str = "own") -> list[str]:
    return [Path(record["file_name"]).name for record in DatasetCatalog.get(name)]


# ---- in a line of Python ----


def test_any_kind_of_image_in_subfolders(tmp_path: Path) -> None:
    names = ["a.jpg", "b.JPEG", "c/d.png", "c/e.webp", "f.tif", "g.tiff", "h.bmp"]
    write(tmp_path, *names)
    (tmp_path / "images" / "notes.txt").touch()
    register(tmp_path)
    assert stems() == [Path(name).name for name in names]
    metadata = MetadataCatalog.get("own")
    assert metadata.stuff_classes == CLASSES
    assert len({tuple(color) for color in metadata.stuff_colors}) == 3
    assert (metadata.ignore_label, metadata.evaluator_type) == (255, "sem_seg")
    assert metadata.image_root == str(tmp_path / "images")
    assert metadata.sem_seg_root == str(tmp_path / "annotations")


def test_relative_folders_are_of_where_it_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    register_folder("own", "images", "annotations", CLASSES)
    monkeypatch.chdir("/")
    assert DatasetCatalog.get("own")[0]["file_name"] == str(tmp_path / "images" / "a.jpg")


def test_one_folder_for_both_kinds(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "b.jpg")
    for path in (tmp_path / "annotations").iterdir():
        path.rename(tmp_path / "images" / path.name)
    folder = tmp_path / "images"
    register_folder("mixed", folder, folder, CLASSES)
    with pytest.raises(DataError, match="suffix"):
        DatasetCatalog.get("mixed")
    register_folder("own", folder, folder, CLASSES, image_ext="jpg", label_ext=".png")
    assert stems() == ["a.jpg", "b.jpg"]


def test_endings_instead_of_extensions(tmp_path: Path) -> None:
    write(tmp_path, "a_rgb.png", "b_rgb.png")
    for path in (tmp_path / "annotations").iterdir():
        path.rename(path.with_name(path.name.replace("rgb", "mask")))
    register(tmp_path, image_ext="_rgb.png", label_ext=["_mask.png", "_mask.tif"])
    assert stems() == ["a_rgb.png", "b_rgb.png"]


@pytest.mark.parametrize("table", [[255, 0, 1, 2], {0: 255, 1: 0, 2: 1, 3: 2}])
def test_label_map(tmp_path: Path, table: Any) -> None:
    write(tmp_path, "a.jpg", classes=3)
    path = tmp_path / "annotations" / "a.png"
    raw = np.array([[0, 1, 2, 3]], np.uint8)
    Image.fromarray(raw).save(path)
    register(tmp_path, label_map=table)
    (record,) = DatasetCatalog.get("own")
    assert read_label(record["sem_seg_file_name"], record["label_map"]).tolist() == [[255, 0, 1, 2]]


def test_label_map_of_a_published_dataset(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    register(tmp_path, label_map="ade20k", classes=[f"c{index}" for index in range(150)])
    assert DatasetCatalog.get("own")[0]["label_map"] == "ade20k"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "at least one"),
        ({"classes": ["a", "b", "a"]}, "different names"),
        ({"classes": "road"}, "list of names"),
        ({"classes": ["a", 3]}, "list of names"),
        ({"ignore": 0}, r"classes 0\.\.2.* in 3\.\.255; it is 0.*label_map"),
        ({"ignore": 256}, r"it is 256"),
        ({"classes": [str(index) for index in range(256)]}, "256 classes.*maximum is 255"),
        ({"colors": [[0, 0, 0]]}, "3 RGB triples"),
        ({"label_map": "ade"}, "label map 'ade'.*registered are: ade20k"),
        ({"label_map": [0, 300]}, r"outside 0\.\.255"),
        ({"label_map": {-1: 0}}, r"not in 0\.\.65535"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register(tmp_path, **options)
    assert "own" not in DatasetCatalog


def test_a_name_stands_for_one_folder(tmp_path: Path) -> None:
    register(tmp_path)
    register(tmp_path)
    for options in ({"label_ext": ".tif"}, {"classes": ["a"]}, {"label_map": "ade20k"}):
        with pytest.raises(ValueError, match="'own'"):
            register(tmp_path, **options)
    with pytest.raises(ValueError, match=r"'own'.*image_root"):
        register(tmp_path / "other")


def test_a_refused_registration_leaves_nothing_behind(tmp_path: Path) -> None:
    register(tmp_path)
    with pytest.raises(ValueError, match="'own'"):
        register(tmp_path, label_map={0: 255, 1: 0})
    assert "own" not in reading.LABEL_MAPS
    assert len(MetadataCatalog.get("own").stuff_classes) == 3


def test_a_name_is_registered_again(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    register(tmp_path, label_map={0: 255, 1: 0, 2: 1, 255: 255})
    register(tmp_path, label_map={0: 255, 1: 0, 2: 1, 255: 255})
    register(
        tmp_path, label_map={0: 0, 1: 1, 2: 2, 255: 255}, classes=["a", "b", "c"], replace=True
    )
    (record,) = DatasetCatalog.get("own")
    assert read_label(record["sem_seg_file_name"], record["label_map"]).min() == 0
    assert MetadataCatalog.get("own").stuff_classes == ["a", "b", "c"]


def test_labels_as_jpeg(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "b.jpg")
    for path in (tmp_path / "annotations").iterdir():
        path.rename(path.with_suffix(".jpg"))
    register(tmp_path)
    with pytest.raises(DataError, match=r"annotations' has no.*It has 2 \.jpg\. JPEG.* as PNG"):
        DatasetCatalog.get("own")
    with pytest.raises(ValueError, match=r"'.own2'.*|\.jpg.*JPEG"):
        register(tmp_path, "own2", label_ext=".jpg")
    with pytest.raises(ConfigError, match=r"FOLDERS\[0\].*JPEG"):
        load_config(config(tmp_path, FOLDERS=folders("own3", LABEL_EXT=".jpg")))


def test_missing_pairs_and_folders(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "annotations" / "b.png").unlink()
    register(tmp_path)
    with pytest.raises(DataError, match=r"1 \(b\).* 'a/1\.jpg' and"):
        DatasetCatalog.get("own")
    register(tmp_path / "nowhere", "nowhere")
    with pytest.raises(DataError, match=r"no folder '.*nowhere/images' for the images"):
        DatasetCatalog.get("nowhere")


def test_letters_that_two_systems_store_differently(tmp_path: Path) -> None:
    """macOS writes the accent of a letter as a character of its own."""
    write(tmp_path, "caf\u00e9.jpg", "b.jpg")
    path = tmp_path / "annotations" / "caf\u00e9.png"
    path.rename(path.with_name("cafe\u0301.png"))
    register(tmp_path)
    assert len(stems()) == 2
    assert ImageFiles(tmp_path / "images").find("cafe\u0301.jpg", tmp_path / "labels.json")


@pytest.mark.parametrize("kind", ["training", "importing", "predicting", "command"])
def test_one_rule_for_the_files_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Links are followed, but not in circles; what is hidden is left out."""
    root = tmp_path / "images"
    write(tmp_path, "a.jpg", "sub/b.jpg", ".hidden/c.jpg", ".d.jpg", "lost+found/e.jpg")
    (tmp_path / "disk" / "images").mkdir(parents=True)
    shutil.copy(root / "a.jpg", tmp_path / "disk" / "images" / "f.jpg")
    for name, target in (("up", root), ("top", tmp_path), ("disk", tmp_path / "disk")):
        (root / "sub" / name).symlink_to(target, target_is_directory=True)
    (root / "sub" / "itself.txt").symlink_to("itself.txt")
    listed: dict[str, Callable[[], Iterable[Any]]] = {
        "training": lambda: find_files(str(root), ".jpg", "images").values(),
        "importing": lambda: ImageFiles(root).paths,
        "predicting": lambda: image_files(root),
        "command": lambda: find_inputs([str(root)], tmp_path / "out"),
    }
    found = sorted(os.path.relpath(path, root) for path in listed[kind]())
    assert found == ["a.jpg", "sub/b.jpg", "sub/disk/images/f.jpg"]
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if os.path.basename(path) == "disk":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"sub/disk' cannot be read: Permission denied"):
        listed[kind]()


# ---- from a config alone ----


def folders(*names: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"NAME": name, "IMAGE_DIR": "images", "LABEL_DIR": "annotations", **more} for name in names
    ]


def config(tmp_path: Path, **section: Any) -> str:
    return tiny.write_config(
        tmp_path / "config.yaml",
        DATASETS={
            "FOLDERS": folders("own"),
            "FOLDER_CLASSES": CLASSES,
            "FOLDER_ROOT": str(tmp_path),
            "TRAIN": ["own"],
            "TEST": ["own"],
            **section,
        },
    )


def test_config_registers_its_folders(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    entry = {
        "CLASSES": ["a", "b"],
        "COLORS": [[1, 2, 3], [4, 5, 6]],
        "IMAGE_EXT": ".jpg",
        "LABEL_EXT": [".png"],
        "LABEL_MAP": {0: 1, 1: 0, 2: 255, 255: 255},
    }
    cfg = load_config(config(tmp_path, FOLDERS=folders("own") + folders("other", **entry)))
    assert stems("own") == stems("other") == ["a.jpg"]
    assert MetadataCatalog.get("own").stuff_classes == CLASSES
    assert MetadataCatalog.get("other").stuff_classes == ["a", "b"]
    assert MetadataCatalog.get("other").stuff_colors == [[1, 2, 3], [4, 5, 6]]
    (record,) = DatasetCatalog.get("other")
    label = read_label(record["sem_seg_file_name"], record["label_map"])
    assert set(np.unique(label)) == {0, 1, 255}
    # The config that a run writes into its output folder says the same.
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    assert load_config(str(tmp_path / "dump.yaml")).DATASETS == cfg.DATASETS


@pytest.mark.parametrize("root", ["", "here", "/absolute"])
def test_where_folders_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    absolute = [{"NAME": "b", "IMAGE_DIR": "/i", "LABEL_DIR": "/l"}]
    load_config(config(tmp_path, FOLDER_ROOT=root, FOLDERS=folders("own") + absolute))
    start = {"": tmp_path / "datasets", "here": tmp_path / "here"}.get(root, Path(root))
    assert MetadataCatalog.get("own").image_root == str(start / "images")
    assert MetadataCatalog.get("own").sem_seg_root == str(start / "annotations")
    assert MetadataCatalog.get("b").image_root == "/i"


def test_the_last_config_counts(tmp_path: Path) -> None:
    path = config(tmp_path, FOLDERS=folders("own", LABEL_MAP=[0, 1, 2]))
    load_config(path)
    cfg = load_config(path, ["DATASETS.FOLDER_CLASSES", "['a', 'b']"])
    assert MetadataCatalog.get("own").stuff_classes == ["a", "b"]
    tiny.unregister("own")
    register_config_folders(cfg)  # as in a process that gets the config from another one
    assert MetadataCatalog.get("own").stuff_classes == ["a", "b"]


@pytest.mark.parametrize("given", [None, "ade20k"])
def test_a_name_that_a_published_label_map_has(tmp_path: Path, given: str | None) -> None:
    """Another registration of the dataset, which every training does, leaves the map."""
    published = reading.LABEL_MAPS["ade20k"]
    own = {"CLASSES": [f"c{i}" for i in range(150)], **({"LABEL_MAP": given} if given else {})}
    path = config(tmp_path, FOLDERS=folders("ade20k", **own))
    for _ in range(3):
        load_config(path)
    assert reading.LABEL_MAPS["ade20k"] is published
    with pytest.raises(ValueError, match="Label map 'ade20k'"):
        register(tmp_path, "ade20k", label_map=[0, 1, 2], replace=True)
    assert reading.LABEL_MAPS["ade20k"] is published


def test_number_of_classes_by_itself(tmp_path: Path) -> None:
    overrides = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "0"]
    cfg = load_config(config(tmp_path), overrides)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    cfg = load_config(config(tmp_path, TRAIN=[], TEST=["ade20k_raw_sem_seg_val"]), overrides)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 150
    with pytest.raises(ConfigError, match="NUM_CLASSES is 0"):
        load_config(config(tmp_path, TRAIN=["nowhere"], TEST=[]), overrides)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"NAME": "own", "LABEL_DIR": "b"}], r"FOLDERS\[0\] needs IMAGE_DIR"),
        (folders("own", CLASES=["a"]), r"\[0\] has the key 'CLASES'.*Did you mean 'CLASSES'"),
        (folders("own", name="x"), r"\[0\] has the key 'name'.*Did you mean 'NAME'"),
        (folders("a") + ["b"], r"FOLDERS\[1\] must be a mapping"),
        (folders("own", CLASSES=[]), r"FOLDERS\[0\]: .*at least one.*FOLDER_CLASSES"),
        (folders("own", COLORS=3), r"FOLDERS\[0\]: "),
        (folders("own", LABEL_MAP={"a": 1}), r"FOLDERS\[0\]: "),
        (folders("camvid_sem_seg_train"), r"'camvid_sem_seg_train' is registered already"),
    ],
)
def test_mistakes_in_a_config(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config(tmp_path, FOLDERS=entries))


@pytest.mark.parametrize(
    "name", ["semask_example", "semask_small_example", "semask_pretrained_example"]
)
def test_example_config_trains_on_any_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """As its head says, with two keys, and a model and images of a size for tests."""
    with tiny.own_loggers():
        for split in ("train", "val"):
            write(tmp_path / split, "a.jpg", "sub/b.png")
            for kind in ("images", "annotations"):
                (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
                (tmp_path / split / kind).rename(tmp_path / "data" / kind / split)
        small = tiny.tiny_config()["MODEL"]
        two_stages = {
            **{f"MODEL.SWIN.{key}": value for key, value in small["SWIN"].items()},
            **{f"MODEL.SEMASK.{key}": value for key, value in small["SEMASK"].items()},
            "MODEL.SEM_SEG_HEAD.IN_FEATURES": small["SEM_SEG_HEAD"]["IN_FEATURES"],
        }
        overrides: dict[str, Any] = {
            "DATASETS.FOLDER_ROOT": tmp_path / "data",
            "DATASETS.FOLDER_CLASSES": CLASSES,
            **({} if name == "semask_pretrained_example" else two_stages),
            "MODEL.TIMM.PRETRAINED": False,
            "MODEL.DEVICE": "cpu",
            "INPUT.SCALE": [64, 48],
            "INPUT.CROP.SIZE": [32, 32],
            "SOLVER.MAX_ITER": 1,
            "SOLVER.IMS_PER_BATCH": 2,
            "DATALOADER.NUM_WORKERS": 0,
            "OUTPUT_DIR": tmp_path / "out",
        }
        flat = [str(part) for pair in overrides.items() for part in pair]
        path = config_path(f"own_dataset/{name}")
        assert train_net.run(["--config-file", path, *flat]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "out" / "panels.png")
    assert "First step: loss" in out
    assert "copypaste" not in out
    assert "csv" not in out
    assert "Namespace(" not in out
    assert "Namespace(" in (tmp_path / "out" / "log.txt").read_text()
    report = json.loads((tmp_path / "out/inference/own_val/sem_seg_evaluation.json").read_text())
    assert report["class_names"] == CLASSES
    assert np.array(report["confusion_matrix"]).sum() == 2 * 40 * 48


def test_example_config_needs_two_keys_only() -> None:
    """The keys in the head of the file are those that a user must change."""
    given = yaml.safe_load(Path(config_path("own_dataset/semask_example")).read_text())
    assert {"FOLDER_ROOT", "FOLDER_CLASSES"} <= given["DATASETS"].keys()
    assert given["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"] == 0
    assert all(
        set(entry) == {"NAME", "IMAGE_DIR", "LABEL_DIR"} for entry in given["DATASETS"]["FOLDERS"]
    )


# ---- datasets that are hard on a pipeline ----


def hard_dataset(folder: Path, kind: str) -> None:
    write(folder, "a.jpg")
    if kind == "an image of one row":
        write(folder, "b.png", height=1, width=50)
    elif kind == "an image of one column":
        write(folder, "b.png", height=50, width=1)
    elif kind == "an image smaller than a window":
        write(folder, "b.png", height=3, width=2)
    elif kind == "an ignored image":
        write(folder, "b.png", classes=0)
    elif kind == "nothing but ignored images":
        write(folder, "a.jpg", "b.png", classes=0)
    elif kind == "a class that is nowhere":
        write(folder, "a.jpg", classes=2)


@pytest.mark.parametrize(
    ("kind", "crop"),
    [
        ("one image", True),
        ("an image of one row", True),
        ("an image of one row", False),
        ("an image of one column", True),
        ("an image smaller than a window", True),
        ("an image smaller than a window", False),
        ("an ignored image", True),
        ("nothing but ignored images", True),
        ("a class that is nowhere", True),
    ],
)
def test_hard_datasets(tmp_path: Path, kind: str, crop: bool) -> None:
    hard_dataset(tmp_path, kind)
    overrides = ["SOLVER.MAX_ITER", 2, "INPUT.CROP.ENABLED", crop, "INPUT.SCALE_FACTORS", [1.0]]
    overrides += ["SOLVER.IMS_PER_BATCH", 2 if crop else 1, "MODEL.DEVICE", "cpu"]
    overrides += ["OUTPUT_DIR", tmp_path / "out"]
    trainer = Trainer(load_config(config(tmp_path), [str(value) for value in overrides]))
    trainer.resume_or_load(resume=False)
    trainer.train()
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    losses = [entry["total_loss"] for entry in map(json.loads, lines) if "total_loss" in entry]
    assert losses
    assert np.isfinite(losses).all()
    if kind == "nothing but ignored images":
        assert losses == [0.0]
    report = json.loads((tmp_path / "out/inference/own/sem_seg_evaluation.json").read_text())
    pixels = np.array(report["confusion_matrix"]).sum(axis=0)
    records = DatasetCatalog.get("own")
    labels = np.concatenate([read_label(r["sem_seg_file_name"]).ravel() for r in records])
    assert pixels.tolist() == [*np.bincount(labels, minlength=256)[[0, 1, 2, 255]]]
