"""Trackers record what a run writes, resume with it, and never end it."""

import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

import tiny
import train_command
from semask.config import load_config
from semask.engine import Trainer
from semask.engine.trackers import (
    TRACKER_REGISTRY,
    TrackedRun,
    Tracker,
    TrackerWriter,
    check_trackers,
)
from semask.errors import ConfigError
from tiny_runs import assert_same_state
from tracker_records import READERS

OPTIONS = ("SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)

SHIPPED = sorted(name for name, _ in TRACKER_REGISTRY)


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every tracker writes to a folder; trackio reads its setting once, when it is imported."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("WANDB_DIR", raising=False)
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
        yield


class Recorder(Tracker):
    """A tracker that stores all records in its class."""

    name = "recorder"
    package = "json"

    started: list[str | None]
    ended: list[bool]
    steps: list[int]

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        type(self).started = [run_id]
        type(self).ended, type(self).steps = [], []
        return run_id or "first"

    def log(
        self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]
    ) -> None:
        self.steps.append(step)

    def finish(self, complete: bool) -> None:
        self.ended.append(complete)


class Refusing(Recorder):
    """A tracker without network."""

    name = "refusing"

    def log(
        self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]
    ) -> None:
        raise ConnectionError("no route to the host")

    def finish(self, complete: bool) -> None:
        raise ConnectionError("no route to the host")


class Unknown(Recorder):
    """A tracker without a login."""

    name = "unknown"

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        raise PermissionError("log in first")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three above, entered for one test."""
    monkeypatch.setattr(TRACKER_REGISTRY, "_obj_map", dict(TRACKER_REGISTRY))
    for tracker in (Recorder, Refusing, Unknown):
        TRACKER_REGISTRY.register(tracker)


def train(folder: Path, trackers: list[str], *options: Any, resume: bool = False) -> Trainer:
    path = tiny.write_config(folder / "config.yaml", TRACKERS=trackers, TEST={"REPORT": False})
    fixed = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder / "out")]
    trainer = Trainer(load_config(path, [*fixed, *map(str, options)]))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def run_ids(out: Path) -> dict[str, str]:
    return json.loads((out / "trackers.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a run without trackers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with tiny.datasets(folder):
        train(folder, [], *OPTIONS)
    return torch.load(folder / "out" / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_records_a_run_and_its_continuation(
    name: str,
    tmp_path: Path,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stopped and resumed run gives bit for bit the result of one without trackers."""
    pytest.importorskip(TRACKER_REGISTRY.get(name).package)
    keys = ("TRACKING.PROJECT", f"tests-{tmp_path.name}", "TRACKING.RUN_NAME", "first garden")
    run_step = Trainer.run_step

    def stop_at_3(self: Trainer) -> None:
        if self.iter == 3:
            raise RuntimeError("stopped")
        run_step(self)

    with tiny.datasets(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_step", stop_at_3)
            with pytest.raises(RuntimeError, match="stopped"):
                train(tmp_path, [name], *OPTIONS, *keys)
        run_id = run_ids(tmp_path / "out")[name]
        train(tmp_path, [name], *OPTIONS, *keys, resume=True)
    assert run_ids(tmp_path / "out") == {name: run_id}
    places = [
        message.rpartition(f"as {run_id} in ")[2].removeprefix("file://")
        for message in caplog.messages
        if f"'{name}' records this run" in message
    ]
    assert len(places) == 2
    assert all(Path(place).is_dir() for place in places)
    checkpoint = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert_same_state(checkpoint, undisturbed)

    records = READERS[name](keys[1], run_id, tmp_path / "out")
    expected = {}
    for line in (tmp_path / "out" / "metrics.json").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("iteration")
        values.pop("eta_seconds", None)  # not a result
        expected.update({(step, key): value for key, value in values.items()})
    assert {(1, "sem_seg/mIoU"), (2, "total_loss"), (4, "lr"), (5, "sem_seg/mIoU")} <= set(expected)
    assert records.scalars == pytest.approx(expected)
    assert {(1, "panels"), (5, "panels")} <= records.images
    assert (records.base_lr, records.name) == ("0.01", "first garden")


@pytest.mark.usefixtures("own")
def test_the_main_process_alone_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.started = []
    with tiny.datasets(tmp_path):
        monkeypatch.setattr(comm, "is_main_process", lambda: False)
        train(tmp_path, ["recorder"], "TEST.EVAL_PERIOD", 0)
    assert Recorder.started == []


@pytest.mark.usefixtures("own")
def test_a_tracker_that_fails_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tiny.datasets(tmp_path):
        train(tmp_path, ["refusing", "recorder"], "TEST.EVAL_PERIOD", 2)
    assert (tmp_path / "out" / "model_final.pth").is_file()
    assert (Recorder.steps, Recorder.ended) == ([1, 2, 3], [True])
    warnings = [r.getMessage() for r in caplog.records if "'refusing'" in r.getMessage()]
    warnings = [w for w in warnings if "records this run" not in w]
    assert len(warnings) == 3  # the first record, the end, and how many there were
    assert "no route to the host" in warnings[0]
    assert "3 records" in warnings[2]


@pytest.mark.usefixtures("own")
def test_a_run_that_ends_early_is_marked_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_self: Trainer) -> None:
        raise RuntimeError("broken")

    with tiny.datasets(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_step", fails)
            with pytest.raises(RuntimeError, match="broken"):
                train(tmp_path, ["recorder"])
        assert (Recorder.started, Recorder.ended) == ([None], [False])
        train(tmp_path, ["recorder"], resume=True)
        assert (Recorder.started, Recorder.ended) == (["first"], [True])


@pytest.mark.usefixtures("own")
def test_a_tracker_that_cannot_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused at the start of a run; a resumed run continues without it."""
    with tiny.datasets(tmp_path):
        flags = ("MODEL.DEVICE", "cpu", "TRACKERS", ["recorder", "unknown"])
        assert train_command.run(tmp_path, *flags) == 2
        assert "TRACKERS: 'unknown'" in capsys.readouterr().err
        assert Recorder.ended == [False]
        (tmp_path / "out" / "trackers.json").write_text('{"unknown": "an-id"}')
        train(tmp_path, ["unknown"], resume=True)
    assert (tmp_path / "out" / "model_final.pth").is_file()
    assert "log in first" in capsys.readouterr().out


def test_nobody_waits_for_a_tracker_that_does_not_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answer = threading.Event()

    class Silent(Recorder):
        def log(self, *_arguments: Any) -> None:
            answer.wait()

    caplog.set_level(logging.WARNING, "semask")
    run = TrackedRun(project="tests", name="silent", folder=str(tmp_path), config={})
    writer = TrackerWriter(Silent(), run, max_iter=5000)
    writer.start()
    with EventStorage() as storage:
        for storage.iter in range(1100):
            storage.put_scalar("loss", 1.0)
            writer.write()
        writer.close()
    writer.finish(timeout=0.01)
    assert any("does not answer" in record.getMessage() for record in caplog.records)
    assert any("did not finish" in record.getMessage() for record in caplog.records)
    answer.set()
    writer.finish()
    assert Recorder.ended == [False]


def test_a_name_that_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command.run(tmp_path, "TRACKERS", ["nobody"]) == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in ("TRACKERS", "'nobody'", *SHIPPED))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_package_that_is_missing(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, TRACKER_REGISTRY.get(name).package, None)
    assert train_command.run(tmp_path, "TRACKERS", [name]) == 2
    printed = capsys.readouterr().err
    assert f"'{name}'" in printed
    assert "semask[trackers]" in printed
    assert not (tmp_path / "out").exists()


def test_mlflow_without_databases_writes_to_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("SEED: 1\n")
    tracker: Any = TRACKER_REGISTRY.get("mlflow")()
    run = TrackedRun(project="tests", name="here", folder=str(tmp_path), config={"SEED": 1})
    run_id = tracker.start(run, None)
    tracker.log(7, {"sem_seg/IoU-snow, (old)/": 1.0, "loss": float("nan")}, {})
    picture = np.zeros((2, 3, 3), np.uint8)
    tracker.log(8, {"IoU-straße": 2.0, "IoU-a/../b": 3.0, "x" * 300: 4.0}, {"Straße/.": picture})
    tracker.finish(True)
    uri = mlflow.get_tracking_uri() if (tmp_path / "mlflow.db").exists() else "mlruns"
    found = mlflow.MlflowClient(uri).get_run(run_id)
    assert found.data.metrics["sem_seg/IoU-snow_ _old__"] == 1.0
    assert found.data.metrics["IoU-straße"] == 2.0
    assert found.data.metrics["IoU-a/_/b"] == 3.0
    assert found.data.metrics["x" * 250] == 4.0
    (image, *_) = mlflow.MlflowClient(uri).list_artifacts(run_id, "images")
    assert Path(image.path).name.startswith("Stra_e")


@pytest.mark.usefixtures("own")
def test_a_package_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all, a module in another one, and one whose parent is missing; odd entries."""
    cfg = load_config("", ["TRACKERS", "['recorder']"])
    for package in ("", "os.path"):
        monkeypatch.setattr(Recorder, "package", package)
        check_trackers(cfg)
    monkeypatch.setattr(Recorder, "package", "no_such_package.tracking")
    with pytest.raises(ConfigError, match=r"no_such_package\.tracking"):
        check_trackers(cfg)
    with pytest.raises(ConfigError, match=r"TRACKERS has \['recorder'\]"):
        check_trackers(load_config("", ["TRACKERS", "[['recorder']]"]))


def test_images_of_any_kind(tmp_path: Path) -> None:
    """Bytes and floating-point numbers, arrays and tensors, which may still have a gradient."""
    seen: list[np.ndarray] = []

    class Eyes(Recorder):
        def log(self, step: int, scalars: Mapping[str, float], images: Any) -> None:
            seen.extend(images[name] for name in sorted(images))

    writer = TrackerWriter(Eyes(), TrackedRun("tests", "x", str(tmp_path), {}), max_iter=1)
    writer.start()
    floating = torch.ones(3, 2, 5)
    with EventStorage() as storage:
        storage.put_image("a", np.full((3, 2, 5), 255, np.uint8))
        storage.put_image("b", floating)
        storage.put_image("c", floating.clone().requires_grad_())
        writer.write()
        writer.close()
    writer.finish()
    assert len(seen) == 3
    for image in seen:
        assert (image.shape, image.dtype, image.min()) == ((2, 5, 3), np.uint8, 255)


def test_errors_name_the_tracker(tmp_path: Path) -> None:
    writer = TrackerWriter(Unknown(), TrackedRun("tests", "x", str(tmp_path), {}), max_iter=1)
    with pytest.raises(ConfigError, match="'unknown'"):
        writer.start()
    with EventStorage():
        writer.write()  # and nothing more
        writer.close()
    writer.finish()
