"""Files of an earlier run are not overwritten or mixed unless the user requests it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode

import tiny
import train_command
from semask.config import load_config
from semask.engine import Trainer
from semask.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def records(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    with tiny.datasets(tmp_path) as records, tiny.own_loggers():
        yield records


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT_DIR of a run of three iterations, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    with tiny.datasets(folder):
        trainer = Trainer(config(folder))
        trainer.resume_or_load(resume=False)
        trainer.train()
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def config(folder: Path, *overrides: Any) -> CfgNode:
    path = tiny.write_config(folder / "config.yaml")
    fixed = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", folder / "out", "SOLVER.CHECKPOINT_PERIOD", 1]
    quick = ["TEST.NUM_PANELS", 0, "TEST.REPORT", False]
    return load_config(path, [str(value) for value in (*fixed, *quick, *overrides)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def resume(folder: Path, *overrides: Any) -> Trainer:
    trainer = Trainer(config(folder, *overrides))
    trainer.resume_or_load(resume=True)
    return trainer


# ---- a run from Python sets up what the command sets up ----


def test_the_seed_decides_a_run_from_python(tmp_path: Path, finished: Path) -> None:
    """Whatever has been drawn before."""
    torch.manual_seed(123)
    trainer = Trainer(config(tmp_path))
    trainer.resume_or_load(resume=False)
    trainer.train()
    written = torch.load(finished / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(written[name], v) for name, v in trainer.model.state_dict().items())


def test_a_run_from_python_leaves_its_config(tmp_path: Path, finished: Path) -> None:
    cfg = load_config(str(finished / "config.yaml"))
    assert str(finished) == cfg.OUTPUT_DIR
    assert cfg.MODEL.SWIN.EMBED_DIM == 8
    assert (finished / ".run_lock").exists()


# ---- beginning anew ----


@pytest.mark.parametrize("left", ["model_final.pth", "model_best.pth", "model_0000001.pth"])
def test_a_folder_with_checkpoints_is_refused(tmp_path: Path, out: Path, left: str) -> None:
    for path in out.iterdir():
        if path.is_file() and path.name != left:
            path.unlink()
    before = files(out)
    trainer = Trainer(config(tmp_path))
    for begin in (lambda: trainer.resume_or_load(resume=False), trainer.train):
        with pytest.raises(ConfigError, match=rf"{left}.*--resume.*--overwrite"):
            begin()
    assert {name: data for name, data in files(out).items() if name.startswith("model")} == before


def test_the_command_refuses_before_anything_is_written(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(out)
    assert train_command.run(tmp_path, "MODEL.DEVICE", "cpu") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files(out) == before
    short = ("SOLVER.MAX_ITER", 1, "TEST.NUM_PANELS", 0, "TEST.REPORT", False)
    assert train_command.run(tmp_path, "--overwrite", "MODEL.DEVICE", "cpu", *short) == 0
    assert {path.name for path in out.glob("model_*")} == {"model_final.pth", "model_best.pth"}
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 0


def test_the_best_so_far_stays_where_no_other_checkpoint_does(tmp_path: Path, out: Path) -> None:
    """Of a run that always has --resume and was killed before its first checkpoint."""
    for name in ("last_checkpoint", *(path.name for path in out.glob("model_[0f]*"))):
        (out / name).unlink()
    best = torch.load(out / "model_best.pth", weights_only=True)
    torch.save({**best, "value": 1000.0}, out / "model_best.pth")
    before = (out / "model_best.pth").read_bytes()
    trainer = resume(tmp_path)
    assert trainer.start_iter == 0
    trainer.train()
    assert (out / "model_best.pth").read_bytes() == before


# ---- going on ----


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00\x80" * 9, b"", b"\x00" * 20])
def test_a_lost_or_damaged_last_checkpoint(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").unlink()
    if content is not None:
        (out / "last_checkpoint").write_bytes(content)
    assert resume(tmp_path).start_iter == 3
    assert "last_checkpoint" in caplog.text
    assert "model_0000002.pth" in caplog.text


def test_one_flipped_bit_in_the_newest_checkpoint(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The previous one by iteration is used, not by the files' modification times."""
    newest = out / "model_0000002.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text(newest.name)
    for name, seconds in (("model_0000001.pth", 2**31), ("model_0000000.pth", 2**31 + 9)):
        os.utime(out / name, (seconds, seconds))
    assert resume(tmp_path).start_iter == 2
    assert "model_0000002.pth" in caplog.text
    assert "checksum" in caplog.text


def test_a_damaged_last_checkpoint_alone(tmp_path: Path, out: Path) -> None:
    for path in out.glob("model_*"):
        path.unlink()
    (out / "last_checkpoint").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CheckpointError, match="last_checkpoint'"):
        resume(tmp_path)


def test_a_new_learning_rate_is_not_passed_over(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = resume(tmp_path, "SOLVER.MAX_ITER", 6)
    assert "checkpoint's and not the config's" not in caplog.text
    trainer = resume(
        *(tmp_path, "SOLVER.MAX_ITER", 6, "SOLVER.BASE_LR", 0.5, "SEED", 8),
        *("SOLVER.WEIGHT_DECAY", 0.25, "SOLVER.BETAS", "[0.8, 0.9]"),
    )
    for part in (
        *("SOLVER.BASE_LR 0.01 (config: 0.5)", "SEED 1 (config: 8)"),
        *("SOLVER.WEIGHT_DECAY 0.0001 (config: 0.25)",),
        "SOLVER.BETAS [0.9, 0.999] (config: [0.8, 0.9])",
    ):
        assert part in caplog.text
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.01


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("SOLVER.OPTIMIZER", "SGD"), r"SOLVER\.OPTIMIZER was ADAMW and is now SGD"),
        (("SOLVER.NO_DECAY", "[]"), r"SOLVER\.NO_DECAY"),
        (("MODEL.SWIN.FREEZE_AT", 2), r"MODEL\.SWIN\.FREEZE_AT"),
        (("SOLVER.BACKBONE_MULTIPLIER", 0.1), r"SOLVER\.BACKBONE_MULTIPLIER"),
        (("SOLVER.MAX_ITER", 2), r"trained for 3 iterations, and SOLVER\.MAX_ITER is 2"),
    ],
)
def test_what_cannot_go_on_is_refused(
    tmp_path: Path, out: Path, overrides: tuple[Any, ...], message: str
) -> None:
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        resume(tmp_path, "SOLVER.MAX_ITER", 6, *overrides)
    assert (out / "config.yaml").read_bytes() == before


def test_averaged_weights_that_are_no_longer_wanted_are_mentioned(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = out / "model_final.pth"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "ema": {"steps": 3, "model": {}}}, path)
    resume(tmp_path)
    assert "state 'ema'" in caplog.text


def test_a_state_of_other_shapes_is_refused(tmp_path: Path, out: Path) -> None:
    """As of two parameters of the same group that have changed places."""
    path = out / "model_final.pth"
    content = torch.load(path, weights_only=True)
    state = content["trainer"]["_trainer"]["optimizer"]["state"]
    first = next(n for n in state if state[n]["exp_avg"].shape != state[0]["exp_avg"].shape)
    state[0], state[first] = state[first], state[0]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="has the shape"):
        resume(tmp_path)
