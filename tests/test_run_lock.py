"""Two runs in one folder, and the files that killed ones leave."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import faults
import runs
from semask.engine.launch.run_setup import LOCK_FILE, run_lock
from semask.errors import ConfigError
from tiny_runs import TinyRuns


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    options = ("SOLVER.MAX_ITER", 3, "TEST.NUM_PANELS", 0, "TEST.REPORT", False)
    return TinyRuns(tmp_path_factory.mktemp("locks"), *options)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_second_run_is_refused(tiny_runs: TinyRuns, size: int) -> None:
    output = f"shared{size}"
    arrived, leave = (tiny_runs.folder / f"{output}-{name}" for name in ("arrived", "leave"))
    first = tiny_runs.start(
        output, size=size, fault=faults.wait_at, fault_arguments=(1, str(arrived), str(leave))
    )
    with runs.ended(first):
        first[0].wait_for(arrived.exists)
        before = sorted(path.name for path in (tiny_runs.folder / output).iterdir())
        for flags in ((), ("--resume",)):
            second = tiny_runs.start(output, *flags, size=size)
            with runs.ended(second):
                assert [run.status() for run in second] == [2] * size
            for run in second:
                assert f"Another run (process {first[0].process.pid} on" in run.output()
                assert "OUTPUT_DIR_LOCK" in run.output()
        assert sorted(path.name for path in (tiny_runs.folder / output).iterdir()) == before
        if size == 1:
            tiny_runs.run(output, "OUTPUT_DIR_LOCK", False)  # it was told to
        leave.touch()
        for run in first:
            assert run.status() == 0, run.output()
    if size == 1:
        tiny_runs.run(output, "--resume")  # the lock is gone with the run


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    """Not with its data loading workers, which may run for some seconds more."""
    context = multiprocessing.get_context("fork")
    pids, ours = context.Pipe(duplex=False)
    holder = context.Process(target=_hold_and_fork, args=(str(tmp_path), ours))
    holder.start()
    child = pids.recv()
    try:
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"), run_lock(str(tmp_path)):
            pass
        holder.kill()
        holder.join()
        os.kill(child, 0)  # is there
        with run_lock(str(tmp_path)):
            assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
    finally:
        os.kill(child, signal.SIGKILL)


def _hold_and_fork(folder: str, pids: Connection) -> None:
    with run_lock(folder):
        child = os.fork()
        if child:
            pids.send(child)
        time.sleep(60)


def test_a_folder_that_cannot_be_locked_or_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(ConfigError, match=r"OUTPUT_DIR '.*file' cannot be created")
    with refused, run_lock(str(tmp_path / "file")):
        pass


def test_half_written_files_go_with_the_next_run(tmp_path: Path) -> None:
    """Only those, and not while another run may be writing them."""
    # The second is of version 0.1.
    left = [f".{'0123abcd' * 4}.tmp", ".last_checkpoint.89abcdef.tmp"]
    kept = [".model_1.tmp", "own.0123abcd.tmp", "model_0000000.pth"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    with run_lock(str(tmp_path), enabled=False):
        assert len(list(tmp_path.iterdir())) == 5
    with run_lock(str(tmp_path)):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, LOCK_FILE])


def test_lock_where_it_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_arguments: Any) -> None:
        raise OSError("No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with run_lock(str(tmp_path / "out")):
        assert "cannot be locked (No locks available)" in caplog.text
    assert (tmp_path / "out" / LOCK_FILE).exists()
    with run_lock(str(tmp_path / "none"), enabled=False):
        assert not (tmp_path / "none").exists()
