"""Whole runs in processes of their own, which can be killed, and small groups of processes.

The processes are forked from one that has imported everything, so that each starts at once.
"""

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# More than any process here needs, even where several share a slow core.
DEADLINE = 300.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["faults", "runs", "semask", "tiny", "tiny_runs", "torch.utils.tensorboard", "train_net"]
)

Fault = Callable[..., None]


class Run:
    """A process of its own, whose output goes to a file."""

    def __init__(self, process: ForkServerProcess, log: Path) -> None:
        self.process = process
        self.log = log

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def status(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        self.process.join(DEADLINE)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"a process has not ended in {DEADLINE} seconds:\n{self.output()}")
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something has happened; fail if the process ends before."""
        end = time.monotonic() + DEADLINE
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > end:
                pytest.fail(f"what was waited for did not happen:\n{self.output()}")
            time.sleep(0.01)


def start(
    function: Callable[..., Any], *arguments: Any, log: Path, env: Mapping[str, str] | None = None
) -> Run:
    """Call a function in a new process; its result is the exit status."""
    before = os.environ.get("PYTHONPATH"), os.environ.get("OMP_NUM_THREADS")
    paths = [str(ROOT / "projects" / "SeMask"), str(ROOT), str(ROOT / "tests" / "helpers")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [before[0]])])
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        target = (function, arguments, str(log), dict(env or {}))
        process = _context.Process(target=_child, args=target)
        process.start()
    finally:
        for name, value in zip(("PYTHONPATH", "OMP_NUM_THREADS"), before, strict=True):
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return Run(process, log)


def _child(
    function: Callable[..., Any], arguments: Sequence[Any], log: str, env: Mapping[str, str]
) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # for data loading processes, as usual
    import torch

    torch.set_num_threads(1)
    status = 1
    try:
        status = function(*arguments) or 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.exit(status)


@contextmanager
def ended(runs: Sequence[Run]) -> Iterator[None]:
    """End all processes."""
    try:
        yield
    finally:
        for run in runs:
            if run.process.exitcode is None:
                run.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun_environment(
    rank: int, world_size: int, port: int, restarts: int = 0
) -> dict[str, str]:
    """The variables that torchrun sets for a process."""
    values = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": restarts,
    }
    return {name: str(value) for name, value in values.items()}


def together(
    function: Callable[..., Any], *arguments: Any, folder: Path, size: int = 2
) -> list[Any]:
    """Call a function in processes that are connected over Gloo; the results by rank."""
    folder.mkdir()
    runs = [
        start(member, function, arguments, rank, size, folder, log=folder / f"{rank}.log")
        for rank in range(size)
    ]
    with ended(runs):
        for run in runs:
            assert run.status() == 0, run.output()
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def member(
    function: Callable[..., Any], arguments: Sequence[Any], rank: int, size: int, folder: Path
) -> None:
    import torch.distributed as dist

    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    result = function(*arguments)
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
