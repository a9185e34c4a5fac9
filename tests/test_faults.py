"""Kills at any moment, full disks, damaged and malicious files: no progress is lost."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import runs
import tiny
from semask.checkpoint import SeMaskCheckpointer
from semask.config.loading import load_config
from semask.engine import Trainer
from semask.errors import CheckpointError
from tiny_runs import TinyRuns, assert_same_state

STEPS = 6
OPTIONS = (
    *("SOLVER.MAX_ITER", STEPS, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 2),
    *("TEST.NUM_PANELS", 0, "TEST.REPORT", False),
)


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    return TinyRuns(tmp_path_factory.mktemp("faults"), *OPTIONS)


@pytest.fixture(scope="module")
def undisturbed(tiny_runs: TinyRuns) -> dict[str, Any]:
    tiny_runs.run("whole")
    return tiny_runs.checkpoint("whole")


@pytest.fixture
def in_process(tiny_runs: TinyRuns) -> Iterator[TinyRuns]:
    """For runs in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tiny.register("tiny_train", tiny_runs.records[:-2])
    tiny.register("tiny_val", tiny_runs.records[-2:])
    yield tiny_runs
    tiny.unregister("tiny_train", "tiny_val")
    torch.set_num_threads(threads)


def train(tiny_runs: TinyRuns, output: str, *, resume: bool = True) -> Trainer:
    overrides = [*tiny_runs.options, "OUTPUT_DIR", tiny_runs.folder / output]
    cfg = load_config(tiny_runs.config, [str(value) for value in overrides])
    torch.manual_seed(cfg.SEED)  # the initial weights; train_net.py does so
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


# ---- kills ----


MOMENTS = {"step": 2, "write": 2, "flush": 8, "rename": 6, "evaluation": 2}


@pytest.mark.slow
def test_killed_at_ten_random_moments(tiny_runs: TinyRuns, undisturbed: dict[str, Any]) -> None:
    """Twice among the first few events of each kind, each time resuming the run."""
    draw = random.Random(4)
    moments = [(kind, draw.randint(1, most)) for kind, most in MOMENTS.items() for _ in range(2)]
    draw.shuffle(moments)
    folder, reached = tiny_runs.folder / "killed", set()
    for moment in moments:
        (process,) = tiny_runs.start(
            "killed", "--resume", fault=faults.kill_at_event, fault_arguments=moment
        )
        with runs.ended([process]):
            assert process.status() == -signal.SIGKILL, process.output()
        last = folder / "last_checkpoint"
        if last.exists():  # it never names what cannot be loaded
            torch.load(folder / last.read_text(), weights_only=True)
            reached.add(last.read_text())
    assert len(reached) >= 4
    tiny_runs.run("killed", "--resume")
    assert_same_state(tiny_runs.checkpoint("killed"), undisturbed)
    for name in ("iteration", "value", "model"):
        best = [tiny_runs.checkpoint(output, "model_best")[name] for output in ("killed", "whole")]
        assert_same_state(*best)
    assert list(folder.glob(".*.tmp")) == []  # the half-written files are gone


@pytest.mark.slow
def test_torchrun_with_a_killed_process(tiny_runs: TinyRuns) -> None:
    """torchrun ends the other process and restarts both, which resume."""
    records = tiny_runs.folder / "records.json"
    records.write_text(json.dumps(tiny_runs.records))
    overrides = [str(option) for option in tiny_runs.options]
    output = str(tiny_runs.folder / "torchrun")
    helpers = Path(__file__).parent / "helpers"
    repository = helpers.parents[1]
    paths = (helpers, repository, repository / "projects" / "SeMask")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + ["--max-restarts", "1", "--monitor-interval", "0.1"]
        + [str(helpers / "faulty_train_net.py"), str(records), "3"]
        + ["--config-file", tiny_runs.config, *overrides, "OUTPUT_DIR", output],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert "--resume continues from the last checkpoint" in done.stderr
    assert "Starting training from iteration 0" in done.stdout
    assert "Starting training from iteration 3" in done.stdout
    tiny_runs.run("two", size=2)
    assert_same_state(tiny_runs.checkpoint("torchrun"), tiny_runs.checkpoint("two"))


# ---- the disk ----


def test_full_disk(
    in_process: TinyRuns, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_process.folder / "full"
    save = SeMaskCheckpointer.save

    def save_without_room(self: SeMaskCheckpointer, name: str, **options: Any) -> None:
        with faults.full_disk(50_000 if name == "model_0000002" else 10**9):
            save(self, name, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SeMaskCheckpointer, "save", save_without_room)
        words = r"model_0000002.pth' cannot be written \(\[Errno 27\] File too large"
        with pytest.raises(CheckpointError, match=words):
            train(in_process, "full", resume=False)
    assert list(folder.glob(".*.tmp")) == []
    assert sorted(path.name for path in folder.glob("*.pth")) == [
        *("model_0000000.pth", "model_0000001.pth", "model_best.pth")
    ]
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    assert train(in_process, "full").start_iter == 2
    assert_same_state(in_process.checkpoint("full"), undisturbed)


def test_a_full_disk_says_how_to_go_on(tiny_runs: TinyRuns) -> None:
    processes = tiny_runs.start("no_room", fault=faults.no_room_for_checkpoints)
    with runs.ended(processes):
        assert processes[0].status() == 2
    message = processes[0].output().splitlines()[-1]
    assert "model_0000000.pth' cannot be written" in message
    assert "Make room for OUTPUT_DIR; --resume continues" in message


def test_a_disk_that_is_full_elsewhere_takes_one_message(tiny_runs: TinyRuns) -> None:
    """It is already full for the metrics of the first step."""
    processes = tiny_runs.start("crowded", fault=faults.no_room_for_metrics)
    with runs.ended(processes):
        assert processes[0].status() == 2
    assert processes[0].output().splitlines()[-1].startswith("The disk is full: [Errno 28]")
    assert "Traceback" not in processes[0].output()


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_truncated_newest_checkpoint(
    in_process: TinyRuns, undisturbed: dict[str, Any], caplog: Any, share: float
) -> None:
    """1.0 stands for a file that is gone."""
    output = f"truncated{share}"
    folder = in_process.folder / output
    earlier = train(in_process, output, resume=False)
    assert earlier.start_iter == 0
    (folder / "model_final.pth").unlink()
    newest = folder / "model_0000005.pth"
    (folder / "last_checkpoint").write_text(newest.name)
    if share == 1.0:
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[: int(share * newest.stat().st_size)])
        os.utime(newest)
    foreign = folder / "model_0000099.pth"  # newer than what is to be gone on from
    foreign.write_bytes((folder / "model_0000000.pth").read_bytes())
    if share < 1.0:
        os.utime(foreign, (2**31, 2**31))
    else:
        foreign.unlink()
    caplog.clear()
    assert train(in_process, output).start_iter == 5
    assert "Trying the previous one" in caplog.text
    assert "model_0000004.pth" in caplog.text
    assert_same_state(in_process.checkpoint(output), undisturbed)


def test_no_checkpoint_can_be_read(in_process: TinyRuns) -> None:
    folder = in_process.folder / "hopeless"
    folder.mkdir()
    for name in ("model_0000001.pth", "model_0000003.pth"):
        (folder / name).write_bytes(b"PK\x03\x04, and no more")
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        train(in_process, "hopeless")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.target), "w"))


def test_a_hostile_last_checkpoint_is_refused(in_process: TinyRuns) -> None:
    """No other checkpoint is tried: the user has to check it."""
    folder = in_process.folder / "hostile"
    folder.mkdir()
    target = folder / "executed"
    torch.save({"model": {}, "trainer": Malicious(target)}, folder / "model_0000001.pth")
    (folder / "model_0000000.pth").write_bytes(
        (in_process.folder / "whole" / "model_0000000.pth").read_bytes()
        if (in_process.folder / "whole").exists()
        else b""
    )
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        train(in_process, "hostile")
    assert not target.exists()


def test_another_model_is_no_damage(in_process: TinyRuns, undisturbed: dict[str, Any]) -> None:
    """A checkpoint of another config is refused, not skipped."""
    folder = in_process.folder / "other"
    folder.mkdir()
    model = {name: torch.zeros(1) for name in undisturbed["model"]}
    for name in ("model_0000000.pth", "model_0000001.pth"):
        torch.save({"model": model}, folder / name)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(CheckpointError, match=r"model_0000001\.pth"):
        train(in_process, "other")


def test_pickles_of_more_than_weights_only_with_the_key(in_process: TinyRuns) -> None:
    import pickle
    from pathlib import PurePosixPath

    path = in_process.folder / "zoo.pkl"
    model = Trainer(load_config(in_process.config, ["MODEL.DEVICE", "cpu"])).model
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "made": PurePosixPath("x")}))
    cfg = load_config(
        in_process.config, ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(in_process.folder / "zoo")]
    )
    cfg.MODEL.WEIGHTS = str(path)
    with pytest.raises(CheckpointError, match=r"MODEL\.ALLOW_PICKLE True"):
        Trainer(cfg).resume_or_load(resume=False)
    cfg.MODEL.ALLOW_PICKLE = True
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, torch.from_numpy(arrays[name]))
    assert isinstance(trainer.checkpointer, SeMaskCheckpointer)
