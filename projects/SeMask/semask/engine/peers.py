"""When one process of a run is killed, the others of the machine end soon, with a message.

A collective operation with a process that is gone fails at once between CPUs, but can wait for
long between GPUs, and a process that evaluates notices nothing.
"""

import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator

from detectron2.utils import comm

# Seconds in which a process may end by itself, with its own message, once another one has ended.
GRACE = 20.0


@contextlib.contextmanager
def watched_peers(grace: float = GRACE) -> Iterator[None]:
    """Within it, this process ends (status 1) after another one of the run has.

    For all processes together; they have to leave it together, too. Only processes of the same
    machine are watched, and only where the system offers to (Linux).

    Args:
        grace: seconds for this process to come to its own end.
    """
    own = (socket.gethostname(), os.getpid())
    others = [
        (rank, pid)
        for rank, (host, pid) in enumerate(comm.all_gather(own))
        if host == own[0] and pid != own[1]
    ]
    watched = {descriptor: peer for peer in others if (descriptor := _descriptor(peer[1]))}
    if not watched:
        yield
        return
    left = threading.Event()
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
        yield
    finally:
        left.set()
        os.close(writing)  # wakes the thread
        thread.join()
        for descriptor in (*watched, reading):
            os.close(descriptor)


def _descriptor(pid: int) -> int | None:
    """A file descriptor that becomes readable when the process ends; None if there is no such."""
    pidfd_open = getattr(os, "pidfd_open", None)
    if pidfd_open is None:
        return None
    try:
        return pidfd_open(pid)
    except OSError:  # refused by the kernel, or in another container with the same host name
        return None
