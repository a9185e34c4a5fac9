"""A run that is told to end (SIGTERM) writes a checkpoint and leaves with status 143."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)

# What a shell gives for a process that SIGTERM has ended.
EXIT_STATUS = 128 + signal.SIGTERM


class Preempted(SystemExit):
    """The run ends because it was told to; it is no error, and nothing is lost."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class StopRequest:
    """Whether this process has got a SIGTERM.

    In the middle of a training step it is only noted, so that all processes of a run can end
    after the same step; where nothing is half done, as in an evaluation, it acts at once.
    """

    def __init__(self) -> None:
        self.received = False
        self._at_once = False
        self._process = os.getpid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, a SIGTERM is noted instead of ending the process."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python gives signals to the main thread alone
            return
        before = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it, a SIGTERM raises ``Preempted`` at whatever is being done.

        Raises:
            Preempted: also where one has come before.
        """
        self._at_once = True
        try:
            if self.received:
                raise Preempted
            yield
        finally:
            self._at_once = False

    def _receive(self, _signal: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loading process of an evaluation
            os._exit(0)
        self.received = True
        if self._at_once:
            self._at_once = False  # a second one must not disturb the way out
            raise Preempted


@contextlib.contextmanager
def passed_on(*, enabled: bool = True) -> Iterator[None]:
    """Within it, a SIGTERM goes to the processes that this one has started, and they decide.

    Args:
        enabled: False does nothing.
    """
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(_signal: int, _frame: FrameType | None) -> None:
        processes = multiprocessing.active_children()
        if not processes:
            raise Preempted
        for process in processes:
            process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopHook(HookBase):
    """End the training after a step in which a process of the run was told to."""

    def after_step(self) -> None:
        if self.trainer.stop_agreed:
            logger.warning("Told to end (SIGTERM) after iteration %d", self.trainer.iter)
            raise Preempted
