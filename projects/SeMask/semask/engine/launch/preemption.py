"""A run writes a checkpoint before SIGTERM or Ctrl-C ends it (status 143, 130)."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from detectron2.engine import HookBase
from detectron2.utils import comm

from semask.utils.signals import handled

logger = logging.getLogger(__name__)

# What a shell gives for a process that SIGTERM has ended.
EXIT_STATUS = 128 + signal.SIGTERM
# Seconds in which a second SIGINT is the same Ctrl-C: a terminal sends it to all processes, and
# those that have started others pass it on.
SAME_CTRL_C = 1.0
FAREWELL = b"\nInterrupted: a checkpoint is written first. Ctrl-C again ends at once.\n"


class Preempted(SystemExit):
    """The run ends after a SIGTERM, with a checkpoint; nothing is lost."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Interrupted(KeyboardInterrupt):
    """The run ends after a Ctrl-C, with a checkpoint; nothing is lost."""


class StopRequest:
    """Whether this process has received a SIGTERM or a SIGINT (Ctrl-C).

    In the middle of a training step it is only noted, so that all processes of a run can end
    after the same step; where nothing is half done, as in an evaluation, it acts at once. A second
    Ctrl-C always does, without a checkpoint.
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
            yield  # Python gives signals to the main thread alone
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
            Preempted, Interrupted: also where one has come before.
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
            Preempted: after a SIGTERM, or what another process of the run has got.
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
            self._at_once = False  # a second one must not disturb the way out
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
            logger.warning("Told to end after iteration %d", self.trainer.iter)
            self._request.leave()
