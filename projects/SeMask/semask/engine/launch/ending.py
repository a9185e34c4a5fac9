"""Runs that end early: each prints one message on stderr and has an exit status.

After a SIGTERM or Ctrl-C, a run writes a checkpoint before it ends (status 143, 130).
"""

import contextlib
import errno
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, NoReturn

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from semask.data.training_loader import is_lost_loader
from semask.engine.launch.distributed import LOST_PEER, is_lost_peer
from semask.engine.train_step import NonFiniteLossError
from semask.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingCheckpointError,
    OutOfMemoryError,
    UnwritableCheckpointError,
)
from semask.utils.text import one_line

logger = logging.getLogger(__name__)

USER_ERRORS = (ConfigError, DataError, CheckpointError)

MAKE_ROOM = (
    "Make room for OUTPUT_DIR; --resume continues from the last checkpoint, if there is one."
)
LOST_LOADER = (
    "A data loading worker was killed, usually because the machine has too little memory: lower "
    "DATALOADER.NUM_WORKERS or SOLVER.IMS_PER_BATCH. --resume continues from the last checkpoint."
)
# What to do about errors whose message does not say it, because other programs raise them, too.
ADVICE: dict[type[Exception], str] = {
    MissingCheckpointError: (
        " Correct MODEL.WEIGHTS, or with --resume the file 'last_checkpoint' in OUTPUT_DIR."
    ),
    UnwritableCheckpointError: f" {MAKE_ROOM}",
}

# The exit status that a shell reports for a process ended by SIGTERM.
EXIT_STATUS = 128 + signal.SIGTERM
# Seconds in which a second SIGINT is the same Ctrl-C: a terminal sends it to all processes, and
# those that have started others pass it on.
SAME_CTRL_C = 1.0
FAREWELL = b"\nInterrupted: a checkpoint is written first. Ctrl-C again ends at once.\n"


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """Turn errors that a user can fix into a message.

    Raises:
        SystemExit: with 2 for a mistake in config, data or checkpoint and for a full disk, 1 for a
            loss that is not finite, a device with too little memory, or another process that is
            gone (of the run, or one that loads data), 130 after Ctrl-C. Other errors stay as they
            are.
    """
    try:
        yield
    except USER_ERRORS as error:
        _report(error)
        raise SystemExit(2) from None
    except (NonFiniteLossError, OutOfMemoryError) as error:
        _report(error)
        raise SystemExit(1) from None
    except ProcessExitedException as error:  # of ``launch``; the process has said why
        print(error, file=sys.stderr)
        raise SystemExit(max(1, error.exit_code)) from None
    except (OSError, RuntimeError) as error:
        if _is_full_disk(error):
            print(f"The disk is full: {one_line(error)}. {MAKE_ROOM}", file=sys.stderr)
            raise SystemExit(2) from None
        if is_lost_loader(error):
            print(f"{LOST_LOADER} ({one_line(error)})", file=sys.stderr)
            raise SystemExit(1) from None
        if not is_lost_peer(error):
            raise
        print(f"{LOST_PEER} ({one_line(error)})", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(
            "Interrupted; --resume continues from the last checkpoint, if there is one.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def is_expected(error: BaseException) -> bool:
    """Whether ``exit_statuses`` has a message for an error, so its traceback is not needed."""
    known = (*USER_ERRORS, NonFiniteLossError, OutOfMemoryError, ProcessExitedException)
    return (
        isinstance(error, known)
        or _is_full_disk(error)
        or is_lost_peer(error)
        or is_lost_loader(error)
        or is_out_of_memory(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is lacking: of PyTorch's allocator of the GPU or the CPU, or of Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )


def _is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _report(error: Exception) -> None:
    advice = ADVICE.get(type(error), "")
    where = f"Process {comm.get_rank()}: " if comm.get_world_size() > 1 else ""
    print(f"{where}{type(error).__name__}: {_message(error)}{advice}", file=sys.stderr)


def _message(error: Exception) -> str:
    """The error's message, without the traceback that a data loading process puts around it."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return text


class Preempted(SystemExit):
    """The run ends after a SIGTERM, with a checkpoint; nothing is lost."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Interrupted(KeyboardInterrupt):
    """The run ends after a Ctrl-C, with a checkpoint; nothing is lost."""


class StopRequest:
    """Whether this process has received a SIGTERM or a SIGINT (Ctrl-C).

    During a training step a signal is only recorded, so that all processes of a run end after the
    same step. During an evaluation it ends the run at once. A second Ctrl-C always ends it at
    once, without a checkpoint.
    """

    def __init__(self) -> None:
        self.received = False
        self._at_once = False
        self._process = os.getpid()
        self._number = signal.SIGTERM
        self._time = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which a signal is recorded instead of ending the process."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals only to the main thread
            return
        numbers = {signal.SIGTERM}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as behind nohup
            numbers.add(signal.SIGINT)
        with handled(self._receive, numbers):
            yield

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A context in which a signal raises at once, as ``leave`` does.

        Raises:
            Preempted, Interrupted: also for a signal received before this context.
        """
        self._at_once = True
        try:
            if self.received:
                self.leave()
            yield
        finally:
            self._at_once = False

    def leave(self) -> NoReturn:
        """
        Raises:
            Interrupted: after a Ctrl-C to this process.
            Preempted: after a SIGTERM, or after a signal to another process of the run.
        """
        raise Interrupted if self._number == signal.SIGINT else Preempted

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loading process of an evaluation
            os._exit(0)
        first, now = not self.received, time.monotonic()
        if number == signal.SIGINT and not first:
            if now - self._time < SAME_CTRL_C:
                return
            raise KeyboardInterrupt
        self.received = True
        if first:
            self._number, self._time = signal.Signals(number), now
            if number == signal.SIGINT and comm.is_main_process():
                os.write(2, FAREWELL)  # a handler must not use Python's buffered streams
        if self._at_once:
            self._at_once = False  # a second signal must not interrupt the ending
            self.leave()


@contextlib.contextmanager
def passed_on(*, enabled: bool = True) -> Iterator[None]:
    """A context in which signals are passed on to the processes that this one has started.

    Args:
        enabled: False does nothing.
    """
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, _frame: FrameType | None) -> None:
        processes = multiprocessing.active_children()
        if not processes:
            raise KeyboardInterrupt if number == signal.SIGINT else Preempted
        for process in processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    with handled(pass_on, (signal.SIGTERM, signal.SIGINT)):
        yield


class StopHook(HookBase):
    """End the training after a step in which a process of the run received a signal."""

    def __init__(self, request: StopRequest) -> None:
        """
        Args:
            request: of this process.
        """
        self._request = request

    def after_step(self) -> None:
        if self.trainer.stop_agreed:
            logger.warning("Stop requested: ending after iteration %d", self.trainer.iter)
            self._request.leave()


@contextlib.contextmanager
def handled(
    handler: Callable[[int, FrameType | None], Any], numbers: Collection[int]
) -> Iterator[None]:
    """A context in which a handler receives some signals; for the main thread.

    Args:
        handler: see ``signal.signal``. The previous handlers are restored on exit.
        numbers: of the signals.
    """
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
