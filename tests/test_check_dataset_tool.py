"""The command that checks datasets: what it prints and draws, and its exit status."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny
from own_folder import BY_DEFECT, CLASSES, write_folder
from semask.cli import main
from semask.data import register_folder

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def test_command_on_folders(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--images", str(folder / "images"), "--labels", str(folder / "annotations")]
    assert (
        main.run("check", [*own, "--classes", *CLASSES, "--picture", str(tmp_path / "a.png")]) == 0
    )
    out = capsys.readouterr().out
    assert "Dataset 'folder': 5 images with label maps" in out
    assert f"Picture: {tmp_path / 'a.png'}" in out
    picture = Image.open(tmp_path / "a.png")
    assert picture.mode == "RGB"
    assert picture.height > 5 * 6
    assert main.run("check", [*own, "--num-classes", "9"]) == 0  # the same name again


def test_command_with_numbers_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--images", str(folder / "images"), "--labels", str(folder / "annotations")]
    report = tmp_path / "report.json"
    assert main.run("check", [*own, "--num-classes", "2", "--json", str(report)]) == 1
    assert "not classes: 2 (8 pixels)" in capsys.readouterr().out
    (document,) = json.loads(report.read_text())
    assert [entry["name"] for entry in document["classes"]] == ["class 0", "class 1"]
    assert document["problems"][0]["kind"] == "unusable label map"


@BY_DEFECT
def test_exit_status(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    kind: str,
    words: str,
    pairs: int,
) -> None:
    assert main.run("check", ["own", "--threads", "2"]) == 0
    damage(folder)
    picture = folder.parent / "picture.png"
    assert main.run("check", ["own", "--picture", str(picture)]) == 1
    assert words in capsys.readouterr().out
    assert picture.exists() == (pairs > 0)


def test_several_datasets_and_configs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_folder("few", folder / "images", folder / "annotations", ["sky"])
    assert (
        main.run("check", ["own", "few", "--picture", str(tmp_path / "p.png"), "--rows", "2"]) == 1
    )
    assert {path.name for path in tmp_path.glob("p_*.png")} == {"p_own.png", "p_few.png"}
    config = tiny.write_config(
        tmp_path / "config.yaml",
        DATASETS={"TRAIN": ["own"], "TEST": ["own"]},
        MODEL={"SEM_SEG_HEAD": {"NUM_CLASSES": 4}},
    )
    capsys.readouterr()
    assert main.run("check", ["--config-file", config]) == 0
    assert capsys.readouterr().out.count("Dataset 'own'") == 1
    assert main.run("check", ["--config-file", config, "DATASETS.TEST", "('few',)"]) == 1
    assert "Dataset 'few'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Pass names of datasets"),
        (["camvid_sem_seg_vall"], "Did you mean 'camvid_sem_seg_val'"),
        (["own", "--images", "a", "--labels", "b"], "Pass names of datasets"),
        (["--images", "a", "--classes", "b"], "needs --images, --labels"),
        (["--images", "a", "--labels", "b"], "--classes or --num-classes"),
        (["--images", "a", "--labels", "b", "--classes", "c", "c"], "different names"),
        (["own", "--sample", "-1"], "--sample cannot be negative"),
        (["--config-file", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_in_the_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main.run("check", arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.mark.parametrize("option", ["--picture", "--json"])
def test_files_that_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "file").touch()
    assert main.run("check", ["own", option, str(tmp_path / "file" / "report")]) == 2
    captured = capsys.readouterr()
    assert "No problems." in captured.out
    assert f"'{tmp_path / 'file'}" in captured.err


def test_unknown_option() -> None:
    with pytest.raises(SystemExit) as info:
        main.run("check", ["own", "--colour"])
    assert info.value.code == 2


def test_real_samples(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shared / "data" / "samples"))
    arguments: list[Any] = ["--picture", tmp_path / "p.png", "--json", tmp_path / "r.json"]
    names = ["ade20k_raw_sem_seg_val", "coco_stuff_164k_sem_seg_val"]
    assert main.run("check", [*names, *map(str, arguments)]) == 0
    ade, stuff = json.loads((tmp_path / "r.json").read_text())
    assert (ade["pairs"], stuff["pairs"]) == (2, 4)
    assert len(list(tmp_path.glob("p_*.png"))) == 2


def test_what_passes_the_check_of_a_config_is_not_refused_by_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (folder / "images", folder / "annotations")
    register_folder("other", *own, ["sky", "grass", "tree", "lake", "snow"])
    config = tiny.write_config(
        tmp_path / "config.yaml",
        DATASETS={"TRAIN": ["own"], "TEST": ["other"]},
        MODEL={"SEM_SEG_HEAD": {"NUM_CLASSES": 4}},
    )
    assert main.run("check", ["own"]) == main.run("check", ["other"]) == 0
    assert main.run("check", ["--config", config]) == 1
    assert "'other' has 5" in capsys.readouterr().out


def test_classes_in_another_order_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (folder / "images", folder / "annotations")
    register_folder("other", *own, ["sky", "tree", "grass", "snow"])
    config = tiny.write_config(
        tmp_path / "config.yaml",
        DATASETS={"TRAIN": ["own"], "TEST": ["other"]},
        MODEL={"SEM_SEG_HEAD": {"NUM_CLASSES": 4}},
    )
    assert main.run("check", ["--config", config]) == 1
    assert "number 1 is 'grass' in dataset 'own' and 'tree' in 'other'" in capsys.readouterr().out
