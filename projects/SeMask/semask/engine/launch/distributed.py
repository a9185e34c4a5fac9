"""The processes of a run that torchrun has started; Detectron2's ``launch`` makes its own.

When one of them is killed, the others of the machine end soon, with a message.
"""

import contextlib
import inspect
import os
import select
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semask.errors import ConfigError
from semask.utils.device import Torchrun

# How long a process waits for the others, as with ``launch``: one of them may evaluate meanwhile.
TIMEOUT = timedelta(minutes=30)

LOST_PEER = (
    "Another process of this run has ended or cannot be reached, so this one ends too. The output "
    "of the other process has the error; --resume continues from the last checkpoint."
)


def ignore_storage_warning() -> None:
    """Silence PyTorch's warning, in each process, about Detectron2 v0.6's serialisation."""
    warnings.filterwarnings(
        "ignore",
        message="TypedStorage is deprecated",
        category=UserWarning,
        module=r"detectron2\.utils\.comm$",
    )


@contextlib.contextmanager
def joined(torchrun: Torchrun | None, device: str) -> Iterator[None]:
    """Connect this process with the others, over NCCL for GPUs and Gloo for CPUs.

    Args:
        torchrun: None changes nothing: a single process, or one of ``launch``.
        device: ``MODEL.DEVICE``; "cuda" gives each process of a machine a GPU of its own.

    Raises:
        ConfigError: the machines run different numbers of processes.
    """
    if torchrun is None:
        yield
        return
    ignore_storage_warning()
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(torchrun.local_rank)
    store = _store_of_this_start(torchrun)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=torchrun.rank,
        world_size=torchrun.world_size,
        timeout=TIMEOUT,
    )
    create_local_group(torchrun.local_world_size)
    comm.synchronize()
    yield
    # After an error the others may be gone, and destroying would wait for them.
    dist.destroy_process_group()


def _store_of_this_start(torchrun: Torchrun) -> dist.Store:
    """The store in which the processes find each other.

    When torchrun restarts the processes, its store still has the addresses of the ended ones, to
    which Gloo would connect. Therefore each start has its own prefix in the store.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    name = f"semask/{torchrun.world_size}/{torchrun.restarts}"
    # Starts without a failure (machines that came or went) have the same number of restarts.
    start = (store.add(f"{name}/processes", 1) - 1) // torchrun.world_size
    return dist.PrefixStore(f"{name}/{start}", store)


def once_per_machine(action: Callable[[], None], torchrun: Torchrun | None) -> None:
    """Run an action in one process of each machine; if one fails, all processes end.

    Args:
        action: what it does.
        torchrun: None where there is no other process yet.

    Raises:
        Exception: what ``action`` raised, in the process that did it.
        SystemExit: in the others, with status 2.
    """
    if torchrun is None:
        action()
        return
    failure: Exception | None = None
    if torchrun.local_rank == 0:
        try:
            action()
        except Exception as error:
            failure = error
    anywhere = any(comm.all_gather(failure is not None))
    if failure is not None:
        raise failure
    if anywhere:
        raise SystemExit(2)


def create_local_group(size: int) -> None:
    """Create Detectron2's groups of the processes of each machine; collective.

    Args:
        size: number of processes on each machine.

    Raises:
        ConfigError: that is not the same on all of them.
    """
    world_size, rank = comm.get_world_size(), comm.get_rank()
    if any(other != size for other in comm.all_gather(size)):
        raise ConfigError("All machines must run the same number of processes.")
    create = getattr(comm, "create_local_process_group", None)
    if create is not None:
        create(size)
        return
    for first in range(0, world_size, size):  # release v0.6 leaves it to ``launch``
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process of the run cannot be reached any more."""
    if comm.get_world_size() == 1:
        return False
    # Gloo has no error class of its own, but its messages begin with a source file of it.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/" in str(error)
    )


# Seconds in which a process may end by itself, with its own message, once another one has ended.
GRACE = 20.0


@contextlib.contextmanager
def watched_peers(grace: float = GRACE) -> Iterator[threading.Event]:
    """A context in which this process ends (status 1) after another one of the run has ended.

    Without it, the others would wait: a collective operation with an ended process fails at once
    between CPUs, but can wait for long between GPUs, and an evaluation does not communicate.

    All processes must enter and leave it together. Only processes of the same machine are watched,
    and only on Linux.

    Args:
        grace: seconds in which this process may end by itself.

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
                "--resume continues from the last checkpoint.",
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
    """An identifier of the PID namespace, shared by processes that can see each other."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
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


def wrap_ddp(model: nn.Module) -> nn.Module:
    """``model`` for training in several processes, on the device that it is on.

    Detectron2's own wrapping requires a GPU.

    Args:
        model: on its device already.

    Returns:
        The model in ``DistributedDataParallel``, or as it is in a single process.
    """
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    device_ids = None if device.type == "cpu" else [device]
    # BatchNorm without "Sync" has statistics of its own in each process, as in Detectron2; the
    # trainer broadcasts them before an evaluation. Gradients are views of the buckets that are
    # summed over the processes, not copies.
    options = inspect.signature(DistributedDataParallel.__init__).parameters
    newer = "forward_sync_buffers"  # what recent releases of PyTorch call it
    arguments: dict[str, Any] = {newer if newer in options else "broadcast_buffers": False}
    return DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, **arguments
    )
