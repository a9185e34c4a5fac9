"""Whole training runs of a tiny model: progress, evaluation, pictures, stopping and resuming."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import tiny
from semask.config.loading import load_config
from semask.engine import Trainer, wrap_ddp
from semask.engine.hooks import PriorLossWatch
from semask.errors import CheckpointError, DataError
from semask.tasks import build_task


@pytest.fixture(autouse=True)
def records(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    with tiny.datasets(tmp_path) as records:
        yield records


def config(tmp_path: Path, *overrides: Any, output: str = "out") -> CfgNode:
    path = tiny.write_config(tmp_path / "config.yaml")
    fixed = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / output)]
    torch.manual_seed(0)
    np.random.seed(0)
    return load_config(path, [*fixed, *(str(value) for value in overrides)])


def train(cfg: CfgNode, *, resume: bool = False) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


class Stopped(Exception):
    """Ends a run in the middle."""


class StoppingTrainer(Trainer):
    stop_at = 0

    def run_step(self) -> None:
        if self.iter == self.stop_at:
            raise Stopped
        super().run_step()


def test_a_run_leaves_scalars_pictures_report_and_checkpoint(tmp_path: Path) -> None:
    train(config(tmp_path))
    out = tmp_path / "out"

    steps = {entry["iteration"]: entry for entry in metrics(out)}
    last = steps[2]
    assert min(last["total_loss"], last["loss_sem_seg"], last["loss_prior"]) > 0
    assert last["lr"] == pytest.approx(0.01 * (1 - 2 / 3))
    assert "eta_seconds" in last
    assert 0 <= steps[3]["sem_seg/mIoU"] <= 100

    picture = np.asarray(Image.open(out / "panels.png"))
    events = EventAccumulator(str(out), size_guidance={"images": 0}).Reload()
    assert {"loss_sem_seg", "loss_prior", "lr", "sem_seg/mIoU"} <= set(events.Tags()["scalars"])
    (image,) = events.Images("panels")
    assert (image.height, image.width) == picture.shape[:2]

    report = json.loads((out / "inference/tiny_val/sem_seg_evaluation.json").read_text())
    assert report["results"]["mIoU"] == pytest.approx(steps[3]["sem_seg/mIoU"])
    assert (out / "last_checkpoint").read_text() == "model_final.pth"


def test_a_python_program_need_not_set_up_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # as outside of the tests
    with tiny.own_loggers():
        train(config(tmp_path))
    printed = capsys.readouterr().out
    assert "mIoU" in printed
    assert "total_loss" in printed
    assert printed.count("Starting training from iteration 0") == 1


def test_a_log_that_has_been_set_up_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(config(tmp_path))
    assert capsys.readouterr().out == ""
    assert logging.getLogger("semask").handlers == []


def test_loss_falls(tmp_path: Path) -> None:
    overrides = ("SOLVER.MAX_ITER", 25, "INPUT.PHOTOMETRIC_DISTORTION", False)
    trainer = train(config(tmp_path, *overrides, "INPUT.SCALE_FACTORS", "[1.0]"))
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:2])


@pytest.mark.parametrize(("period", "evaluations"), [(0, 1), (2, 2), (3, 2), (4, 1)])
def test_evaluations_and_their_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, period: int, evaluations: int
) -> None:
    calls: list[str] = []
    test: Any = vars(Trainer)["test"].__func__

    def count(cls: type[Trainer], *args: Any) -> Any:
        calls.append("test")
        return test(cls, *args)

    monkeypatch.setattr(Trainer, "test", classmethod(count))
    train(config(tmp_path, "SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", period))
    events = EventAccumulator(str(tmp_path / "out"), size_guidance={"images": 0}).Reload()
    assert len(calls) == len(events.Images("panels")) == evaluations


def test_no_panels_where_none_are_asked_for(tmp_path: Path) -> None:
    trainer = train(config(tmp_path, "TEST.NUM_PANELS", 0))
    assert not (tmp_path / "out" / "panels.png").exists()
    assert build_task(trainer.cfg).draw_panels(trainer.model) is None


def test_a_failed_run_is_not_evaluated(tmp_path: Path) -> None:
    StoppingTrainer.stop_at = 1
    with pytest.raises(Stopped):
        StoppingTrainer(config(tmp_path)).train()
    assert not (tmp_path / "out" / "inference").exists()
    assert not (tmp_path / "out" / "panels.png").exists()


def test_resume_goes_on_where_the_checkpoint_was_written(tmp_path: Path) -> None:
    overrides = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2)
    StoppingTrainer.stop_at = 3  # iterations 0 to 2 are done, 0 and 1 are in the checkpoint
    with pytest.raises(Stopped):
        StoppingTrainer(config(tmp_path, *overrides)).train()
    out = tmp_path / "out"
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    saved = torch.load(out / "model_0000001.pth", weights_only=True)

    resumed = Trainer(config(tmp_path, *overrides))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    assert resumed.scheduler.last_epoch == 2
    for group in resumed.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.01 * (1 - 2 / 6))
    moments = saved["trainer"]["_trainer"]["optimizer"]["state"]
    for index, state in resumed.optimizer.state_dict()["state"].items():
        assert state["step"] == 2
        assert torch.equal(state["exp_avg"], moments[index]["exp_avg"])
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, saved["model"][name])

    resumed.train()
    last = metrics(out)[-2:]
    assert [entry["iteration"] for entry in last] == [5, 6]
    assert last[0]["lr"] == pytest.approx(0.01 * (1 - 5 / 6))


def test_resuming_equals_an_undisturbed_run(tmp_path: Path) -> None:
    """Except for the data, which is the same in every step here: one image, nothing random."""
    overrides = [
        *("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 1),
        *("DATASETS.TRAIN", "('tiny_one',)", "INPUT.SCALE_FACTORS", "[1.0]"),
        *("INPUT.CROP.SIZE", "[40, 40]", "INPUT.PHOTOMETRIC_DISTORTION", False),
        *("MODEL.SWIN.DROP_PATH_RATE", 0.0, "MODEL.SEMASK.DROPOUT", 0.0),
        *("MODEL.SEM_SEG_HEAD.DROPOUT", 0.0),
    ]
    tiny.register("tiny_one", tiny.write_images(tmp_path / "one", 1))
    try:
        whole = train(config(tmp_path, *overrides, output="whole"))
        StoppingTrainer.stop_at = 2
        with pytest.raises(Stopped):
            StoppingTrainer(config(tmp_path, *overrides, output="parts")).train()
        parts = train(config(tmp_path, *overrides, output="parts"), resume=True)
    finally:
        tiny.unregister("tiny_one")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name


def test_weights_start_a_run_of_its_own(tmp_path: Path) -> None:
    first = train(config(tmp_path))
    weights = tmp_path / "out" / "model_final.pth"
    second = Trainer(config(tmp_path, "MODEL.WEIGHTS", weights, output="second"))
    second.resume_or_load(resume=True)  # nothing to resume there
    assert second.start_iter == 0
    assert second.optimizer.state_dict()["state"] == {}
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name])


def test_weights_alone_are_nothing_to_go_on_from(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    torch.save({"model": Trainer(cfg).model.state_dict()}, out / "model_0000001.pth")
    (out / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(CheckpointError, match=r"out'.*MODEL\.WEIGHTS"):
        Trainer(cfg).resume_or_load(resume=True)


@pytest.mark.parametrize("expected", [True, False])
def test_a_start_from_random_weights_is_pointed_out_where_the_recipe_has_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected: bool
) -> None:
    trainer = Trainer(config(tmp_path, "MODEL.EXPECTS_WEIGHTS", expected))
    trainer.resume_or_load(resume=False)
    assert ("starts from random weights" in caplog.text) == expected
    trainer.checkpointer.save("model_final")
    weights = tmp_path / "out" / "model_final.pth"
    caplog.clear()
    overrides = ("MODEL.EXPECTS_WEIGHTS", expected, "MODEL.WEIGHTS", weights)
    Trainer(config(tmp_path, *overrides, output="other")).resume_or_load(resume=False)
    assert "random weights" not in caplog.text


def test_the_prior_loss_is_watched(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path))
    assert any(isinstance(hook, PriorLossWatch) for hook in trainer._hooks)


def test_averaged_weights_are_evaluated_beside(tmp_path: Path) -> None:
    trainer = train(config(tmp_path, "SOLVER.EMA.ENABLED", True))
    scores = metrics(tmp_path / "out")[-1]
    assert {"sem_seg/mIoU", "ema/sem_seg/mIoU"} <= scores.keys()
    assert (tmp_path / "out/ema/inference/tiny_val/sem_seg_evaluation.json").exists()
    averaged = torch.load(tmp_path / "out" / "model_best_ema.pth", weights_only=True)
    assert averaged["value"] == scores["ema/sem_seg/mIoU"]
    assert trainer.ema is not None
    for name, value in trainer.ema.weights().items():
        assert torch.equal(averaged["model"][name], value)


def test_broken_label_ends_the_run_with_its_name(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    for record in records[:4]:
        label = np.full((tiny.SIDE, tiny.SIDE), 7, dtype=np.uint8)
        Image.fromarray(label).save(record["sem_seg_file_name"])
    with pytest.raises(DataError, match=r"_label\.png'.* 7"):
        train(config(tmp_path))


def test_detectron2_segmentor_and_schedule_work_too(tmp_path: Path) -> None:
    overrides = ("MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    train(config(tmp_path, *overrides, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"))
    assert (tmp_path / "out" / "panels.png").exists()


def test_several_evaluation_datasets_keep_their_reports_apart(tmp_path: Path) -> None:
    train(config(tmp_path, "DATASETS.TEST", "('tiny_val', 'tiny_train')"))
    assert {p.name for p in (tmp_path / "out/inference").iterdir()} == {"tiny_val", "tiny_train"}
    assert "tiny_train/sem_seg/mIoU" in metrics(tmp_path / "out")[-1]


def test_one_process_needs_no_wrapping() -> None:
    model = nn.Linear(1, 1)
    assert wrap_ddp(model) is model
