"""What can happen to a run, put into its process before it starts."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
    """A SIGTERM, then an evaluation that would never end."""

    def test(_cls: type[Trainer], *_arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)

    Trainer.test = classmethod(test)  # type: ignore[method-assign, assignment]


def kill_at_event(_rank: int, number: int) -> None:
    """End the process at the n-th of all steps, writes, flushes, renames and evaluations."""
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            event()
            result = function(*arguments, **options)
            event()
            return result

        return call

    class CountedFile:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: Any) -> int:
            middle = len(data) // 2
            written = self._file.write(data[:middle])
            self._file.flush()
            event()
            return written + self._file.write(data[middle:])

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    save = torch.save

    def counted_save(content: Any, file: Any) -> None:
        save(content, CountedFile(file))

    torch.save = counted_save  # type: ignore[assignment]
    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)
    before_step(lambda _trainer: event())
    evaluate = Trainer.evaluate
    Trainer.evaluate = counted(evaluate)  # type: ignore[method-assign]
