"""Faults that are injected into a run's process before it starts."""

import collections
import contextlib
import errno
import functools
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import JSONWriter

from semask.engine import Trainer

Step = Callable[[Trainer], None]


def before_step(action: Callable[[Trainer], None]) -> None:
    original: Step = Trainer.run_step

    def run_step(self: Trainer) -> None:
        action(self)
        original(self)

    Trainer.run_step = run_step  # type: ignore[method-assign]


def signal_at(rank: int, victim: int, iteration: int, number: int) -> None:
    """Send the process ``victim`` a signal at the start of an iteration."""

    def action(trainer: Trainer) -> None:
        if rank == victim and trainer.iter == iteration:
            os.kill(os.getpid(), number)

    before_step(action)


def wait_at(rank: int, iteration: int, arrived: str, leave: str) -> None:
    """Make a file at the start of an iteration, then wait for another one."""

    def action(trainer: Trainer) -> None:
        if trainer.iter == iteration and rank == 0:
            Path(arrived).touch()
            while not Path(leave).exists():
                time.sleep(0.01)

    before_step(action)


def nan_at(rank: int, victim: int, iteration: int) -> None:
    """A loss that is not a number, of one process."""

    def action(trainer: Trainer) -> None:
        if rank == victim and trainer.iter == iteration:
            model = trainer.checkpointer.model
            model.sem_seg_head.register_forward_hook(
                lambda _module, _inputs, output: (
                    None,
                    {name: value * float("nan") for name, value in output[1].items()},
                )
            )

    before_step(action)


def terminate_in_evaluation(_rank: int) -> None:
    """Send SIGTERM in an evaluation that would never end."""

    def test(_cls: type[Trainer], *_arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)

    Trainer.test = classmethod(test)  # type: ignore[method-assign, assignment]


def kill_in_evaluation(rank: int, victim: int) -> None:
    """Kill one process in an evaluation that would never end for the others."""

    def test(_cls: type[Trainer], *_arguments: Any) -> dict[str, Any]:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            time.sleep(0.01)

    Trainer.test = classmethod(test)  # type: ignore[method-assign, assignment]
    module = sys.modules["semask.engine.runs"]
    patient = vars(module)["watched_peers"]
    vars(module)["watched_peers"] = functools.partial(patient, grace=0.5)


def no_room_for_checkpoints(_rank: int) -> None:
    """The disk is full where a run writes its checkpoints."""

    def save(_content: Any, _file: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.save = save  # type: ignore[assignment]


def no_room_for_metrics(_rank: int) -> None:
    """The disk is full where a run writes its metrics."""

    def write(_self: JSONWriter) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.json")

    JSONWriter.write = write


def kill_at_event(_rank: int, kind: str, number: int) -> None:
    """End the process at the n-th "step", "write", "flush", "rename" or "evaluation".

    Of the many writes of a checkpoint one counts, in the middle of which the process ends; which
    one depends on ``number``. Flushes, renames and evaluations count before and after.
    """
    events = collections.Counter[str]()
    chosen = random.Random(number).randrange(300)

    def event(name: str) -> None:
        events[name] += 1
        if events[kind] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def pluralize(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            event(name)
            result = function(*arguments, **options)
            event(name)
            return result

        return call

    class CountedFile:
        def __init__(self, file: Any) -> None:
            self._file = file
            self._writes = 0

        def write(self, data: Any) -> int:
            self._writes += 1
            if self._writes - 1 != chosen:
                return self._file.write(data)
            middle = len(data) // 2
            written = self._file.write(data[:middle])
            self._file.flush()
            event("write")
            return written + self._file.write(data[middle:])

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    save = torch.save

    def counted_save(content: Any, file: Any) -> None:
        save(content, CountedFile(file))

    torch.save = counted_save  # type: ignore[assignment]
    os.fsync = pluralize("flush", os.fsync)
    os.replace = pluralize("rename", os.replace)
    before_step(lambda _trainer: event("step"))
    Trainer.evaluate = pluralize("evaluation", Trainer.evaluate)  # type: ignore[method-assign]


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The kernel refuses every byte of a file beyond the first ``room`` ones (RLIMIT_FSIZE)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
