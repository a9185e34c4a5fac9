"""Temporary signal handlers."""

import contextlib
import signal
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any


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
