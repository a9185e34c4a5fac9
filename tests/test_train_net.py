"""The command's output and the files that it writes."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
import train_command
from semask.data.datasets.camvid import CLASSES_AND_COLORS as CAMVID
from semask.engine import Trainer
from semask.engine.launch import ending

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def records(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    with tiny.datasets(tmp_path) as records, tiny.own_loggers():
        yield records


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    return functools.partial(train_command.run, tmp_path)


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "inference/tiny_val/sem_seg_evaluation.json").read_text())


def page(folder: Path) -> str:
    return (folder / "inference/tiny_val/report.html").read_text()


def test_training_then_evaluation_alone(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/semask", "train", "a config.yaml"])
    cpu = ("MODEL.DEVICE", "cpu")
    assert command(*cpu) == 0
    assert "of this training, which began with random ones" in page(tmp_path / "out")
    assert "3 of 3" in page(tmp_path / "out")
    assert "semask train &#39;a config.yaml&#39;" in page(tmp_path / "out")
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    assert printed.splitlines()[-1] == str(out / "panels.png")
    assert (out / "panels.png").stat().st_size > 0
    for part in ("loss_sem_seg:", "loss_prior:", "lr:", "| ground ", "mIoU ", "iter: 2"):
        assert part in printed, part
    assert "iter: 2" in (out / "log.txt").read_text()
    assert (out / "config.yaml").exists()

    weights = out / "model_final.pth"
    assert printed.count("Augmentations in training") == 1
    assert printed.count("Augmentations in evaluation") == 1  # report and picture need them, too

    other = tmp_path / "eval"
    assert command("--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", other, *cpu) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(other / "panels.png")
    assert report(other) == report(out)
    assert not (other / "last_checkpoint").exists()

    # The last checkpoint of a folder, and no picture.
    (out / "panels.png").unlink()
    given = (out / "config.yaml").read_text()
    assert command("--eval-only", "--resume", *cpu, "TEST.NUM_PANELS", "0") == 0
    assert "panels.png" not in capsys.readouterr().out
    assert report(out) == report(other)
    assert f"<dd>{weights}</dd>" in page(out)  # not MODEL.WEIGHTS, which is empty
    assert "<dd>3</dd>" in page(out)

    # An evaluation leaves the training's config, and output for no terminal has no colours.
    assert (out / "config.yaml").read_text() == given
    assert "\nSEED: 1\n" in (out / "log.txt").read_text()  # the whole config
    assert "\nSEED: 1\n" not in printed
    assert "\x1b" not in printed + (out / "log.txt").read_text()

    # Going on with a longer schedule.
    assert command("--resume", "SOLVER.MAX_ITER", "5", *cpu) == 0
    assert "Starting training from iteration 3" in capsys.readouterr().out
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 4


def test_seed_decides_the_run(tmp_path: Path, command: Callable[..., int]) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        cpu = ("MODEL.DEVICE", "cpu", "TEST.NUM_PANELS", 0)
        assert command("OUTPUT_DIR", folder, "SEED", seed, *cpu) == 0
        return torch.load(folder / "model_final.pth", weights_only=True)["model"]

    first, again, other = weights("a", 3), weights("b", 3), weights("c", 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_from_another_folder_as_a_program_of_its_own(tmp_path: Path) -> None:
    """CamVid's layout, a relative OUTPUT_DIR, and the device chosen by itself."""
    root = tmp_path / "datasets"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            folder = root / "camvid" / kind / split
            folder.mkdir(parents=True)
            for index in range(2):
                shape = (24, 32, 3) if kind == "images" else (24, 32)
                pixels = rng.integers(0, len(CAMVID), shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.{suffix}")
    config = tiny.write_config(
        tmp_path / "config.yaml",
        DATASETS={"TRAIN": ["camvid_sem_seg_train"], "TEST": ["camvid_sem_seg_val"]},
        MODEL={"SEM_SEG_HEAD": {"NUM_CLASSES": len(CAMVID)}},
        DATALOADER={"NUM_WORKERS": 1},
    )
    work = tmp_path / "elsewhere"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), "--config-file", config]
        + ["SOLVER.MAX_ITER", "1", "OUTPUT_DIR", "out"],
        cwd=work,
        env={
            **os.environ,
            "DETECTRON2_DATASETS": str(root),
            "PYTHONPATH": str(ROOT / "projects" / "SeMask"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = done.stdout.splitlines()[-1]
    assert path == os.path.join("out", "panels.png")
    assert (work / path).exists()


def send_at(number: int, iteration: int, times: int = 1) -> Callable[[Trainer], None]:
    """``Trainer.run_step``, in which this process gets a signal."""
    run_step = Trainer.run_step

    def run(self: Trainer) -> None:
        for _ in range(times if self.iter == iteration else 0):
            os.kill(os.getpid(), number)
        run_step(self)

    return run


def test_ctrl_c_writes_a_checkpoint(
    tmp_path: Path,
    command: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", send_at(signal.SIGINT, 1, times=2))  # as one
        assert command("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 1) == 130
    out, err = capfd.readouterr()
    assert "Ctrl-C again ends at once" in err
    assert "Traceback" not in out + err
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert command("--resume", "MODEL.DEVICE", "cpu", "TEST.NUM_PANELS", 0) == 0
    assert "Starting training from iteration 2" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_at_once(
    tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "SAME_CTRL_C", -1.0)
    monkeypatch.setattr(Trainer, "run_step", send_at(signal.SIGINT, 1, times=2))
    assert command("MODEL.DEVICE", "cpu") == 130
    assert not (tmp_path / "out" / "last_checkpoint").exists()


def test_a_killed_data_loading_process_takes_one_message(
    command: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_step = Trainer.run_step

    def run(self: Trainer) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)
        run_step(self)

    monkeypatch.setattr(Trainer, "run_step", run)
    steps = ("SOLVER.MAX_ITER", 50)
    assert command("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 1, *steps) == 1
    out, err = capfd.readouterr()
    assert err.strip().splitlines()[-1].startswith("A data loading worker was killed")
    assert "DATALOADER.NUM_WORKERS" in err
    assert "Traceback" not in out + err


def test_ctrl_c(
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_self: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run_step", interrupted)
    assert command("MODEL.DEVICE", "cpu") == 130
    message = capsys.readouterr().err
    assert message.strip().splitlines()[-1].startswith("Interrupted; --resume")
    assert "Traceback" not in message
