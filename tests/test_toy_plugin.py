"""A task and a decoder in a file of their own: the package needs no change for either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from semask.cli import main
from tiny_model import photograph


def command(folder: Path, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that knows the tests' folder but has not imported the plugin."""
    images = folder / f"images{len(list(folder.glob('images*')))}"  # each process writes its own
    paths = [repository / "projects" / "SeMask", repository / "tests" / "helpers"]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "TOY_PLUGIN_IMAGES": str(images),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_task_and_a_decoder_of_ones_own(tmp_path: Path, repository: Path) -> None:
    config = tiny.write_config(
        tmp_path / "config.yaml",
        TASK="toy",
        MODEL={"SEM_SEG_HEAD": {"NAME": "ToyHead"}, "DEVICE": "cpu"},
        DATASETS={"TRAIN": ["toy_train"], "TEST": ["toy_val"]},
        OUTPUT_DIR=str(tmp_path / "out"),
    )
    train = str(repository / "train_net.py")
    done = command(tmp_path, repository, train, "--import", "toy_plugin", "--config-file", config)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert any(line.get("loss_toy", 0) > 0 and line.get("loss_prior", 0) > 0 for line in lines)
    assert lines[-1]["toy/answer"] == 42
    assert (tmp_path / "toy_marks.txt").read_text().split("\n")[:2] == [
        "check of toy_train",
        "mapper of training",
    ]
    assert set((tmp_path / "toy_marks.txt").read_text().splitlines()) == {
        *("check of toy_train", "check of toy_val"),
        *("mapper of training", "transform of training"),
        *("mapper of evaluation", "transform of evaluation"),
    }
    results = json.loads((out / "inference/toy_val/sem_seg_evaluation.json").read_text())
    assert results["class_names"] == list(tiny.CLASSES)
    report = json.loads((out / "inference/toy_val/toy_report.json").read_text())
    assert report["classes"] == list(tiny.CLASSES)
    assert not (out / "inference/toy_val/report.html").exists()
    with Image.open(out / "toy_panels.png") as panels:
        assert panels.size == (8, 8)
    assert not (out / "panels.png").exists()
    assert str(out / "toy_panels.png") in done.stdout

    Image.fromarray(photograph(20, 30)).save(tmp_path / "photo.png")
    (tmp_path / "toy_marks.txt").unlink()
    weights = str(out / "model_final.pth")
    options = ("--config", config, "--weights", weights, "--device", "cpu")
    predict = ("-m", "semask", "predict", "photo.png", "--import", "toy_plugin", *options)
    done = command(tmp_path, repository, *predict)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "predictions" / "labels" / "photo.png") as labels:
        assert np.unique(np.asarray(labels)).tolist() == [len(tiny.CLASSES) - 1]
    assert (tmp_path / "toy_marks.txt").read_text().split("\n")[:-1] == ["transform of evaluation"]


def test_a_module_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run("analyze", ["scenes/semask_scenes", "--import", "no_such_module"]) == 2
    assert "no_such_module" in capsys.readouterr().err
