"""A model as a self-contained folder, and the Hub, which is replaced by a fake."""

import json
import shutil
import sys
import types
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

import semask
import tiny
import tiny_model
from semask.engine import Trainer
from semask.errors import CheckpointError, ConfigError, DataError

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture
def predictor(tmp_path: Path) -> Any:
    weights = tiny_model.checkpoint(tmp_path)
    with tiny.datasets(tmp_path):
        yield semask.Predictor(str(tmp_path / "config.yaml"), weights)


@pytest.fixture
def folder(predictor: Any, tmp_path: Path) -> Path:
    return semask.save_pretrained(predictor, tmp_path / "saved", results={"mIoU": 12.345})


def test_a_saved_model_predicts_the_same_where_its_dataset_is_not(
    predictor: Any, folder: Path, tmp_path: Path
) -> None:
    image = tiny_model.photograph(50, 60)
    want = predictor(image, priors=True)
    tiny.unregister("tiny_train", "tiny_val")
    shutil.move(folder, tmp_path / "elsewhere")
    loaded = semask.from_pretrained(tmp_path / "elsewhere", device="cpu")
    got: Any = loaded(image, priors=True)
    assert np.array_equal(got.labels, want.labels)
    assert got.class_names == want.class_names == tiny.CLASSES
    assert np.array_equal(got.colors, want.colors)
    assert got.priors is not None
    assert want.priors is not None
    assert all(np.array_equal(got.priors[key], want.priors[key]) for key in want.priors)
    (name,) = loaded.cfg.DATASETS.TEST
    with pytest.raises(DataError, match=name):
        DatasetCatalog.get(name)
    semask.from_pretrained(tmp_path / "elsewhere")  # registers nothing twice


def test_nothing_of_the_machine_is_saved(predictor: Any, folder: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "classes.json", "README.md"):
        assert str(tmp_path) not in (folder / name).read_text()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: semask\n")
    assert "12.35" in card or "12.34" in card
    assert ", ".join(tiny.CLASSES) in card


def test_categories_keep_their_ids(tmp_path: Path) -> None:
    classes = {
        "thing_classes": ["a", "b"],
        "thing_dataset_id_to_contiguous_id": {7: 0, 3: 1},
    }
    DatasetCatalog.register("cells", list)
    MetadataCatalog.get("cells").set(**classes)
    overrides = ["DATASETS.TEST=('cells',)", "MODEL.DEVICE=cpu", "MODEL.ROI_HEADS.NUM_CLASSES=2"]
    cfg = semask.load_config("nuclei/semask_mask_rcnn", overrides)
    cfg.MODEL.SEMASK.NUM_CLASSES = 3
    weights = tmp_path / "model.pth"
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, weights)
    folder = semask.save_pretrained(semask.Predictor(cfg, weights), tmp_path / "saved")
    DatasetCatalog.remove("cells")
    MetadataCatalog.remove("cells")
    loaded: Any = semask.from_pretrained(folder)
    assert isinstance(loaded, semask.InstancePredictor)
    assert loaded.class_names == ("a", "b")
    assert loaded.category_ids == (7, 3)


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "classes.json"])
def test_what_is_missing_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        semask.from_pretrained(folder)


def test_damaged_files(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        semask.from_pretrained(folder)
    (folder / "classes.json").write_text("[")
    with pytest.raises(ConfigError, match=r"classes\.json"):
        semask.from_pretrained(folder)


def test_the_hub(
    predictor: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    hub = types.SimpleNamespace(
        create_repo=lambda repo, **options: calls.append((repo, options)),
        upload_folder=lambda **options: calls.append(
            {
                path.name
                for path in Path(options["folder_path"]).iterdir()
                if any(fnmatch(path.name, pattern) for pattern in options["allow_patterns"])
            }
        ),
        snapshot_download=lambda repo, revision: str(folder),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    (tmp_path / "up").mkdir()
    (tmp_path / "up/notes.txt").write_text("private", encoding="utf-8")
    semask.save_pretrained(predictor, tmp_path / "up", repo_id="me/garden", private=True)
    assert calls[0] == ("me/garden", {"private": True, "exist_ok": True})
    assert calls[1] == {"README.md", "classes.json", "config.yaml", "model.safetensors"}
    assert "me/garden" in (tmp_path / "up/README.md").read_text()
    loaded: Any = semask.from_pretrained("me/garden")
    assert loaded.class_names == tiny.CLASSES

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    hub.snapshot_download = hub.create_repo = refuse
    with pytest.raises(ConfigError, match="no network"):
        semask.from_pretrained("me/garden")
    with pytest.raises(ConfigError, match="me/garden"):
        semask.save_pretrained(predictor, tmp_path / "up", repo_id="me/garden")


@pytest.mark.parametrize("name", ["config.yaml", "README.md"])
def test_the_folder_of_something_else_is_refused(predictor: Any, tmp_path: Path, name: str) -> None:
    """Such as OUTPUT_DIR, whose config would be replaced."""
    (tmp_path / "run").mkdir()
    for file in (name, "metrics.json"):
        (tmp_path / "run" / file).write_text("own", encoding="utf-8")
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        semask.save_pretrained(predictor, tmp_path / "run")
    found = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "run").iterdir()}
    assert found == {name: "own", "metrics.json": "own"}


def test_a_folder_of_imported_labels_is_refused(predictor: Any, tmp_path: Path) -> None:
    """It has a file classes.json, too."""
    (tmp_path / "classes.json").write_text('{"classes": [], "ignore": 255}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"classes\.json"):
        semask.save_pretrained(predictor, tmp_path)


def test_an_interrupted_save_is_repeated(
    predictor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the clone of a new repository, which has a card."""
    folder = tmp_path / "clone"
    (folder / ".git").mkdir(parents=True)
    for name in (".gitattributes", "README.md"):
        (folder / name).write_text("of the Hub", encoding="utf-8")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("semask.inference.hub.write_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            semask.save_pretrained(predictor, folder)
    semask.save_pretrained(predictor, folder)
    assert isinstance(semask.from_pretrained(folder), semask.Predictor)


def test_a_saved_model_is_replaced(predictor: Any, folder: Path) -> None:
    semask.save_pretrained(predictor, folder, results={"mIoU": 51.25})
    assert "51.25" in (folder / "README.md").read_text(encoding="utf-8")


def test_without_huggingface_hub(
    predictor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"semask\[hub\]"):
        semask.from_pretrained("me/garden")
    with pytest.raises(ConfigError, match=r"semask\[hub\]"):
        semask.save_pretrained(predictor, tmp_path / "up", repo_id="me/garden")
    assert not (tmp_path / "up").exists()


def test_classes_are_json(folder: Path) -> None:
    classes = json.loads((folder / "classes.json").read_text())
    assert classes["stuff_classes"] == list(tiny.CLASSES)
