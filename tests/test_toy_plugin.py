"""A task and a decoder in a file of their own: the package needs no change for either."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    losses = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert any("loss_toy" in entry for entry in losses)
    results = json.loads((out / "inference/toy_val/sem_seg_evaluation.json").read_text())
    assert results["class_names"] == list(tiny.CLASSES)
    report = json.loads((out / "inference/toy_val/toy_report.json").read_text())
    assert report["classes"] == list(tiny.CLASSES)
    assert (out / "panels.png").is_file()

    Image.fromarray(photograph(20, 30)).save(tmp_path / "photo.png")
    weights = str(out / "model_final.pth")
    options = ("--config", config, "--weights", weights, "--device", "cpu")
    predict = ("-m", "semask", "predict", "photo.png", "--import", "toy_plugin", *options)
    done = command(tmp_path, repository, *predict)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "predictions" / "labels" / "photo.png").is_file()


def test_a_module_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run("analyze", ["scenes/semask_scenes", "--import", "no_such_module"]) == 2
    assert "no_such_module" in capsys.readouterr().err
