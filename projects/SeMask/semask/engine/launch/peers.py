"""When one process of a run is killed, the others of the machine end soon, with a message.

A collective operation with a process that is gone fails at once between CPUs, but can wait for
long between GPUs, and a process that evaluates notices nothing.
"""

import contextlib
import os
import select
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm

# Seconds in which a process may end by itself, with its own message, once another one has ended.
GRACE = 20.0


@contextlib.contextmanager
def watched_peers(grace: float = GRACE) -> Iterator[threading.Event]:
    """Within it, this process ends (status 1) after another one of the run has.

    For all processes together; they have to leave it together, too. Only processes of the same
    machine are watched, and only where the system offers to (Linux).

    Args:
        grace: seconds for this process to come to its own end.

    Yields:
        An event that ends the watching when it is set.
    """
    left = threading.Event()
    own = (_machine(), os.getpid())
    others = [
        (rank, pid)
        for rank, (machine, pid) in enumerate(comm.all_gather(own))
        if machine == own[0] and pid != own[1]
    ]
    watched = {descriptor: peer for peer in others if (descriptor := _descriptor(peer[1]))}
    if not watched:
        yield left
        return
    reading, writing = os.pipe()

    def watch() -> None:
        ended = [d for d in select.select([*watched, reading], [], [])[0] if d in watched]
        if not left.is_set() and not left.wait(grace):
            rank, pid = watched[ended[0]]
            print(
                f"Process {rank} of this run (process id {pid}) has ended, so this one ends too. "
                "--resume goes on from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    thread = threading.Thread(target=watch, name="watched_peers", daemon=True)
    thread.start()
    try:
        yield left
    finally:
        left.set()
        os.close(writing)  # wakes the thread
        thread.join()
        for descriptor in (*watched, reading):
            os.close(descriptor)


def _machine() -> str:
    """What only processes that know each other by their ids have in common."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux, where nothing is watched anyway
        return ""


def _descriptor(pid: int) -> int | None:
    """A file descriptor that becomes readable when the process ends; None if there is no such."""
    pidfd_open = getattr(os, "pidfd_open", None)
    if pidfd_open is None:
        return None
    try:
        return pidfd_open(pid)
    except OSError:  # refused by the kernel
        return None
