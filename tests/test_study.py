"""The driver of studies: resuming, interruption, paired differences, tables and figures."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from benchmarks import study
from benchmarks.comparison import difference

from semask import load_config

NAMES = sorted(path.stem for path in study.STUDIES.glob("*.yaml"))
TINY = {
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": [1, 1, 1, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 1, 1, 1],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8,
    "INPUT.CROP.SIZE": [32, 32],
    "INPUT.SCALE": [32, 32],
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "TEST.EVAL_PERIOD": 2,
    "TEST.REPORT": False,
    "TEST.NUM_PANELS": 0,
    "DATALOADER.NUM_WORKERS": 0,
}


def write_study(folder: Path, **changes: Any) -> Path:
    content = {
        "title": "Two models.",
        "metrics": {"sem_seg/mIoU": "mIoU"},
        "seeds": [1, 2, 3],
        "overrides": TINY,
        "runs": {
            "semask": {"label": "SeMask", "config": "scenes/semask_scenes"},
            "fixed": {
                "label": "gamma 0",
                "config": "scenes/semask_scenes",
                "overrides": {"MODEL.SEMASK.INIT": "published"},
            },
        },
        "pairs": [["semask", "fixed"]],
        **changes,
    }
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def write_run(folder: Path, miou: float) -> None:
    """The files of a finished training."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_final.pth").touch()
    lines: list[dict[str, float]] = [{"iteration": 19, "time": 2.0, "total_loss": 5.0}]
    lines.append({"iteration": 19, "sem_seg/mIoU": miou - 1, "sem_seg/IoU-sky": 90.0})
    lines.append({"iteration": 39, "sem_seg/mIoU": miou, "segm/APl": float("nan")})
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    (folder / "usage.json").write_text(json.dumps({"cpu_seconds": 600.0, "peak_gib": 1.5}))


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., list[str]]:
    """Gives the arguments of a study whose runs have these mIoU, seeds 1, 2, ..."""

    def make(**runs: list[float]) -> list[str]:
        for name, values in runs.items():
            for seed, value in enumerate(values, start=1):
                write_run(tmp_path / "out" / f"{name}_seed{seed}", value)
        return [str(write_study(tmp_path)), "--output", str(tmp_path / "out")]

    return make


def test_runs_that_are_finished_are_collected_and_not_trained_again(
    finished: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = finished(semask=[70, 72, 74], fixed=[69, 70, 71])
    assert study.main(arguments) == 0
    text = (tmp_path / "out" / "two.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "72.00 (70.00 to 74.00)" in text
    assert "10.00 (10.00 to 10.00)" in text  # CPU minutes
    assert "+2.00 [+1.00, +3.00]" in text
    report = json.loads((tmp_path / "out" / "two.json").read_text())
    assert report["runs"]["semask"]["seeds"]["2"]["sem_seg/IoU-sky"] == 90
    assert "segm/APl" not in report["runs"]["semask"]["seeds"]["2"]  # not a number
    assert report["runs"]["fixed"]["overrides"][-2:] == ["MODEL.SEMASK.INIT", "published"]
    assert str(tmp_path / "out") not in report["command"]
    again = tmp_path / "again"
    assert study.main([str(tmp_path / "out" / "two.json"), "--output", str(again)]) == 0
    for kind in ("md", "json", "svg"):
        first = (tmp_path / "out" / f"two.{kind}").read_bytes()
        assert (again / f"two.{kind}").read_bytes() == first, kind


def test_a_run_that_was_stopped_in_its_last_evaluation_is_not_finished(tmp_path: Path) -> None:
    write_run(tmp_path, 50.0)
    assert study.results_of(tmp_path) is not None
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('\n{"iteration": 59, "time": 2.0, "total_loss": 4.0}\n')
    assert study.results_of(tmp_path) is None


def test_only_common_seeds_are_paired_and_one_seed_has_no_interval() -> None:
    run = {str(seed): {"m": 10.0 + seed} for seed in (1, 2, 3)}
    one = difference(run, {"2": {"m": 11.0}}, "m")
    assert one is not None
    assert one.values == {"2": 1.0}
    assert np.isnan(one.low)
    assert not one.excludes_zero
    assert difference(run, {"9": {"m": 11.0}}, "m") is None
    assert difference(run, run, "other") is None


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        values = generator.normal(1.0, 2.0, size=30)
        run = {str(i): {"m": float(value)} for i, value in enumerate(values)}
        found = difference(run, {seed: {"m": 0.0} for seed in run}, "m")
        assert found is not None
        assert found.low < found.mean < found.high
        covered += found.low < 1.0 < found.high
    assert 87 <= covered <= 99


def test_a_folder_with_another_run_is_refused(
    finished: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = finished(semask=[70], fixed=[69])
    assert study.main([*arguments, "--seeds", "1"]) == 0
    assert study.main([*arguments, "--seeds", "1", "SOLVER.BASE_LR", "1"]) == 2
    assert "SOLVER.BASE_LR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pairs": [["semask", "other"]]}, "other"),
        ({"run": {}}, "runs"),
        ({"runs": {"semask": {"overrides": {}}}}, "config"),
    ],
)
def test_a_mistake_in_a_study_is_a_sentence(
    changes: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main([str(write_study(tmp_path, **changes)), "--collect"]) == 2
    assert named in capsys.readouterr().err


def test_an_unknown_study_or_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["no_such_study"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in NAMES)
    assert study.main([str(write_study(tmp_path)), "--runs", "swin"]) == 2
    assert "swin" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_configs_of_every_study_load_with_its_overrides(name: str, tmp_path: Path) -> None:
    table = study.read_study(name)
    trainings = study.Trainings(table, tmp_path, 1, ())
    for run, seed in table.jobs(list(table.runs), ()):
        config, overrides = trainings.arguments(run, seed)[1], trainings.arguments(run, seed)[2:]
        assert seed == load_config(config, overrides).SEED


def test_seeds_in_turn() -> None:
    runs = {"a": study.Run("x"), "b": study.Run("y", seeds=(2,))}
    table = study.Study(title="", runs=runs, metrics={}, seeds=(1, 2))
    assert table.jobs(["a", "b"], ()) == [("a", 1), ("a", 2), ("b", 2)]
    assert table.jobs(["b"], (5,)) == [("b", 5)]


# ---- a real training ----


def test_trains_is_stopped_goes_on_and_says_what_failed(tmp_path: Path) -> None:
    runs = {
        "semask": {"config": "scenes/semask_scenes"},
        "wrong": {"config": "scenes/semask_scenes", "overrides": {"NO.SUCH_KEY": 1}},
    }
    overrides = TINY | {"SOLVER.MAX_ITER": 60, "TEST.EVAL_PERIOD": 60}
    path = write_study(tmp_path, runs=runs, seeds=[1], overrides=overrides, pairs=[])
    command = [sys.executable, str(study.ROOT / "benchmarks" / "study.py"), str(path)]
    command += ["--output", str(tmp_path / "out"), "--workers", "2"]
    folder = tmp_path / "out" / "semask_seed1"

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    log = folder / "train.out"
    while not (log.is_file() and "First step" in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert (folder / "last_checkpoint").is_file()
    assert study.results_of(folder) is None
    seconds = json.loads((folder / "usage.json").read_text())["cpu_seconds"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert str(tmp_path / "out" / "wrong_seed1" / "train.out") in done.stderr
    assert "NO.SUCH_KEY" in (tmp_path / "out" / "wrong_seed1" / "train.out").read_text()
    first, second = re.findall(r"Starting training from iteration (\d+)", log.read_text())
    assert int(first) == 0 < int(second)
    results = study.results_of(folder)
    assert results is not None
    assert 0 < results["sem_seg/mIoU"] <= 100
    assert results["cpu_seconds"] > seconds
    report = json.loads((tmp_path / "out" / "two.json").read_text())
    assert report["runs"]["semask"]["commits"]
    assert report["runs"]["wrong"]["seeds"] == {}
