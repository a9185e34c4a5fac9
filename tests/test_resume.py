"""An interrupted run gives the result of an uninterrupted one, bit for bit."""

import signal
from pathlib import Path
from typing import Any

import pytest

import faults
import runs
from semask.engine.launch.distributed import watched_peers
from semask.engine.launch.ending import Preempted, StopRequest
from semask.engine.launch.run_setup import resumes
from tiny_runs import TinyRuns, assert_same_state

# Dropout, stochastic depth and every augmentation are on; evaluations come in between.
OPTIONS = (
    *("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 3),
    *("INPUT.RANDOM_FLIP", "horizontal", "MODEL.SEM_SEG_HEAD.NORM", "SyncBN"),
    *("SOLVER.EMA.ENABLED", True, "SOLVER.IMS_PER_BATCH", 4),
    *("TEST.NUM_PANELS", 0, "TEST.REPORT", False),
)


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    return TinyRuns(tmp_path_factory.mktemp("resume"), *OPTIONS)


@pytest.fixture(scope="module")
def undisturbed(tiny_runs: TinyRuns) -> dict[int, dict[str, Any]]:
    """The last checkpoint by number of processes."""
    for size in (1, 2):
        tiny_runs.run(f"whole{size}", size=size)
    return {size: tiny_runs.checkpoint(f"whole{size}") for size in (1, 2)}


def statuses(processes: list[runs.Run]) -> list[int]:
    with runs.ended(processes):
        return [process.status() for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 1])
def test_killed_alone(
    tiny_runs: TinyRuns, undisturbed: dict[int, dict[str, Any]], before: int
) -> None:
    """With another number of data loading workers after the resumption."""
    output = f"killed-{before}"
    processes = tiny_runs.start(
        *(output, "DATALOADER.NUM_WORKERS", before),
        fault=faults.signal_at,
        fault_arguments=(0, 4, signal.SIGKILL),
    )
    assert statuses(processes) == [-signal.SIGKILL]
    assert (tiny_runs.folder / output / "last_checkpoint").read_text() == "model_0000003.pth"
    printed = tiny_runs.run(output, "--resume", "DATALOADER.NUM_WORKERS", 1 - before)
    assert "Starting training from iteration 4" in printed
    assert_same_state(tiny_runs.checkpoint(output), undisturbed[1])


@pytest.mark.slow
def test_killed_in_two_processes(
    tiny_runs: TinyRuns, undisturbed: dict[int, dict[str, Any]]
) -> None:
    processes = tiny_runs.start(
        *("killed-two", "DATALOADER.NUM_WORKERS", 1),
        size=2,
        fault=faults.signal_at,
        fault_arguments=(1, 4, signal.SIGKILL),
    )
    assert statuses(processes) == [1, -signal.SIGKILL]
    assert "--resume continues from the last checkpoint" in processes[0].output()
    tiny_runs.run("killed-two", "--resume", size=2)
    assert_same_state(tiny_runs.checkpoint("killed-two"), undisturbed[2])
    best = tiny_runs.checkpoint("killed-two", "model_best")
    assert_same_state(best, tiny_runs.checkpoint("whole2", "model_best"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_in_two_processes(
    tiny_runs: TinyRuns, undisturbed: dict[int, dict[str, Any]], number: signal.Signals
) -> None:
    """One of them gets the signal, between two periodic checkpoints."""
    run = f"told{number:d}"
    processes = tiny_runs.start(
        *(run, "DATALOADER.NUM_WORKERS", 1),
        size=2,
        fault=faults.signal_at,
        fault_arguments=(1, 2, number),
    )
    assert statuses(processes) == [143, 128 + number]
    assert "Traceback" not in processes[0].output() + processes[1].output()
    assert (tiny_runs.folder / run / "last_checkpoint").read_text() == "model_0000002.pth"
    assert "from iteration 3" in tiny_runs.run(run, "--resume", size=2)
    assert_same_state(tiny_runs.checkpoint(run), undisturbed[2])


@pytest.mark.slow
def test_told_to_end_in_an_evaluation(
    tiny_runs: TinyRuns, undisturbed: dict[int, dict[str, Any]]
) -> None:
    processes = tiny_runs.start("evaluating", fault=faults.terminate_in_evaluation)
    assert statuses(processes) == [143]
    assert "Traceback" not in processes[0].output()
    assert (tiny_runs.folder / "evaluating" / "last_checkpoint").read_text() == "model_0000002.pth"
    # Training is over, and the last evaluation is not.
    tiny_runs.run("evaluating", "--resume", "TEST.EVAL_PERIOD", 0)
    assert_same_state(tiny_runs.checkpoint("evaluating")["model"], undisturbed[1]["model"])
    (tiny_runs.folder / "evaluating" / "inference").rename(tiny_runs.folder / "moved")
    processes = tiny_runs.start("evaluating", "--resume", fault=faults.terminate_in_evaluation)
    assert statuses(processes) == [143]
    tiny_runs.run("evaluating", "--resume")
    assert (tiny_runs.folder / "evaluating" / "inference").is_dir()


@pytest.mark.slow
def test_two_processes_are_told_to_end_in_an_evaluation(
    tiny_runs: TinyRuns, undisturbed: dict[int, dict[str, Any]]
) -> None:
    processes = tiny_runs.start("both", size=2, fault=faults.terminate_in_evaluation)
    assert statuses(processes) == [143, 143]
    assert "Traceback" not in processes[0].output() + processes[1].output()
    assert (tiny_runs.folder / "both" / "last_checkpoint").read_text() == "model_0000002.pth"
    tiny_runs.run("both", "--resume", size=2)
    assert_same_state(tiny_runs.checkpoint("both"), undisturbed[2])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pidfd_send_signal"), reason="a feature of Linux")
def test_killed_where_nothing_is_trained(
    tiny_runs: TinyRuns, undisturbed: dict[int, dict[str, Any]]
) -> None:
    weights = tiny_runs.folder / "whole2" / "model_final.pth"
    processes = tiny_runs.start(
        *("evaluated", "--eval-only", "MODEL.WEIGHTS", weights),
        size=2,
        fault=faults.kill_in_evaluation,
        fault_arguments=(1,),
    )
    assert statuses(processes) == [1, -signal.SIGKILL]
    assert "Process 1 of this run (process id " in processes[0].output()


@pytest.mark.slow
def test_torchrun_starts_a_failed_run_anew(
    tiny_runs: TinyRuns, undisturbed: dict[int, dict[str, Any]]
) -> None:
    """Its processes resume without --resume, but not from checkpoints of an earlier run."""
    folder = tiny_runs.folder / "restarted"
    tiny_runs.run("restarted", "SOLVER.MAX_ITER", 1, "SEED", 9)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    for restarts, iteration in ((0, 1), (1, 4)):  # before and after the run's first checkpoint
        processes = tiny_runs.start(
            *("restarted", "--overwrite"),
            size=2,
            restarts=restarts,
            fault=faults.signal_at,
            fault_arguments=(0, iteration, signal.SIGKILL),
        )
        assert statuses(processes) == [-signal.SIGKILL, 1]
        assert "Starting training from iteration 0" in processes[0].output()
    printed = tiny_runs.run("restarted", "--overwrite", size=2, restarts=2)
    assert "Starting training from iteration 4" in printed
    assert_same_state(tiny_runs.checkpoint("restarted"), undisturbed[2])


def test_restarts_go_on_from_checkpoints_of_their_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    assert resumes(folder, asked=True)
    assert not resumes(folder, asked=False)
    assert list(tmp_path.iterdir()) == []  # nothing has started this process

    def with_restarts(count: int, *, asked: bool = False) -> bool:
        for name, value in runs.torchrun_environment(0, 1, 1, count).items():
            monkeypatch.setenv(name, value)
        return resumes(folder, asked=asked)

    assert with_restarts(0, asked=True)
    assert not with_restarts(0)
    assert not with_restarts(1)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert with_restarts(1)
    assert with_restarts(2)
    assert not with_restarts(0)  # another run into the same folder
    assert not with_restarts(1)
    assert with_restarts(1, asked=True)
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert with_restarts(2)


def wait_for_nothing() -> None:
    import os
    import time

    import torch.distributed as dist

    with watched_peers(grace=0.5):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10 * runs.DEADLINE)


def leave_one_after_the_other() -> str:
    import time

    import torch.distributed as dist

    with watched_peers(grace=0.0):
        dist.barrier()
    time.sleep(dist.get_rank())
    return "left"


def start_two_and_be_terminated() -> None:
    """As ``launch`` does with its processes."""
    import multiprocessing
    import os
    import time

    from semask.engine import passed_on

    def wait_for_the_end() -> None:
        request = StopRequest()
        with request.listening():
            ready.release()
            while not request.received:
                time.sleep(0.01)
        raise Preempted

    context = multiprocessing.get_context("fork")
    ready = context.Semaphore(0)
    processes = [context.Process(target=wait_for_the_end) for _ in range(2)]
    with passed_on():
        for process in processes:
            process.start()
        for _ in processes:
            ready.acquire()
        os.kill(os.getpid(), signal.SIGTERM)
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [143, 143]
        os.kill(os.getpid(), signal.SIGTERM)  # nobody is left to decide
        time.sleep(runs.DEADLINE)


def test_a_signal_to_what_started_the_processes(tmp_path: Path) -> None:
    process = runs.start(start_two_and_be_terminated, log=tmp_path / "log")
    assert statuses([process]) == [143], process.output()


@pytest.mark.skipif(not hasattr(signal, "pidfd_send_signal"), reason="a feature of Linux")
def test_a_process_that_waits_notices_the_end_of_another(tmp_path: Path) -> None:
    processes = [
        runs.start(
            *(runs.member, wait_for_nothing, (), rank, 2, tmp_path),
            log=tmp_path / f"{rank}.log",
        )
        for rank in range(2)
    ]
    assert statuses(processes) == [1, -signal.SIGKILL]
    assert "Process 1 of this run (process id " in processes[0].output()
    assert "--resume" in processes[0].output()


def test_processes_leave_in_peace(tmp_path: Path) -> None:
    assert runs.together(leave_one_after_the_other, folder=tmp_path / "group") == ["left", "left"]
