"""The endless stream of training batches, which depends only on the seed and the position.

Image number p of a run is the same, with the same augmentation, however many processes, data
loading processes and accumulation steps share the work, and wherever the run was resumed.
"""

import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from torch.utils.data import DataLoader, Dataset, Sampler

from semask.data.unreadable import ReadableBatches, UnreadableFiles
from semask.utils.randomness import image_randomness, shuffled
from semask.utils.text import pluralize

# Time that a data loading process has for its last image.
LAST_IMAGE_SECONDS = 30


class LostLoaderError(RuntimeError):
    """A data loading process has ended unexpectedly."""


class TrainingLoader:
    """Batches of samples for one process of a run; iteration starts at ``position``."""

    def __init__(
        self,
        dataset: Dataset[dict[str, Any]],
        *,
        images_per_step: int,
        accumulate_steps: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        max_unreadable: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            dataset: indexed samples, which a ``ReadableDataset`` gives.
            images_per_step: images of one optimizer step, in all processes together.
            accumulate_steps: batches that make up a step.
            seed: of order and augmentation, not negative.
            num_workers: data loading processes; 0 = none.
            max_unreadable: see ``UnreadableFiles``.
            rank, world_size: this process among those of the run.

        Raises:
            ValueError: the images of a step cannot be shared equally.
        """
        if images_per_step % (accumulate_steps * world_size):
            raise ValueError(
                f"{images_per_step} images of a step cannot be shared equally by {world_size} "
                f"processes times {accumulate_steps} accumulated batches"
            )
        self.unreadable = UnreadableFiles(max_unreadable)
        self.seed = seed
        self.position = 0
        self._dataset = dataset
        self._images_per_step = images_per_step
        self._accumulate_steps = accumulate_steps
        self._num_workers = num_workers
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """
        Yields:
            Batches of images_per_step / accumulate_steps / world_size samples, without end.

        Raises:
            DataError: an image or a label map cannot be used.
            RuntimeError: a data loading process is gone; see ``is_lost_loader``.
        """
        unneeded = multiprocessing.RawValue("b", 0)  # shared with the data loading processes
        # Also where this process ends with the iterator in use.
        finish = Finalize(None, _set, args=(unneeded,), exitpriority=10)
        loader = DataLoader(
            _ReproducibleDataset(self._dataset, self.seed),
            batch_sampler=_Places(self),
            num_workers=self._num_workers,
            collate_fn=list,
            worker_init_fn=functools.partial(_prepare_worker, unneeded),
        )
        stream = iter(loader)
        try:
            for number, batch in enumerate(ReadableBatches(stream, self.unreadable), start=1):
                if number % self._accumulate_steps == 0:
                    self.position += self._images_per_step
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            if is_lost_loader(error) or not _is_gone(getattr(stream, "_workers", [])):
                raise
            # Receiving from a process that has ended fails with various errors.
            raise LostLoaderError(f"{type(error).__name__}: {error}") from error
        finally:
            finish()

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, between two steps."""
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next iterator starts at this position."""
        self.seed, self.position = state_dict["seed"], state_dict["position"]

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """The (index in the dataset, number in the run) of the samples of each batch to come."""
        size = len(self._dataset)  # type: ignore[arg-type]  # it has a length
        share = self._images_per_step // (self._accumulate_steps * self._world_size)
        first = self.position + self._rank * share
        passes: tuple[int, list[int]] = (-1, [])
        while True:
            batch = []
            for position in range(first, first + share):
                if position // size != passes[0]:
                    number = position // size
                    passes = (number, shuffled(size, self.seed, number))
                batch.append((passes[1][position % size], position))
            yield batch
            first += share * self._world_size


class _Places(Sampler[list[tuple[int, int]]]):
    def __init__(self, loader: TrainingLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._loader.places()


class _ReproducibleDataset(Dataset[dict[str, Any]]):
    """Gives each sample the random sequence of its place in the run."""

    def __init__(self, dataset: Dataset[dict[str, Any]], seed: int) -> None:
        """
        Args:
            dataset: returns a sample for each index.
            seed: of the run.
        """
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        index, position = place
        with image_randomness(self._seed, position):
            return self._dataset[index]


def is_lost_loader(error: BaseException) -> bool:
    """Whether an error means that a data loading process has ended; PyTorch has no class for it."""
    return isinstance(error, LostLoaderError) or (
        isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    )


def _is_gone(processes: Sequence[BaseProcess]) -> bool:
    """Whether any of them has ended, or does so within a second."""
    ended = wait([process.sentinel for process in processes], timeout=1)
    for process in processes:
        if process.sentinel in ended:
            # A process closes its pipes before its parent gets SIGCHLD. PyTorch's handler of it
            # raises an error, which would come out of whatever runs next, as the writing of a log.
            process.join(timeout=1)
    return bool(ended)


def _set(flag: Any) -> None:
    flag.value = 1


def _prepare_worker(unneeded: Any, _number: int) -> None:
    """Let a data loading process outlive a SIGTERM or SIGINT to the whole process group.

    The main process has to finish its step, however long that takes, and to write a checkpoint
    then, for which it needs the batch; it ends its data loading processes itself.

    Args:
        unneeded: shared flag that the main process sets when it needs no more batches.
    """
    parent = os.getppid()

    def leave() -> None:
        while os.getppid() == parent and not unneeded.value:
            time.sleep(1)
        if os.getppid() == parent:
            time.sleep(LAST_IMAGE_SECONDS)
        os._exit(0)

    def begin_to_leave(_signal: int, _frame: FrameType | None) -> None:
        threading.Thread(target=leave, daemon=True).start()

    signal.signal(signal.SIGTERM, begin_to_leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loading_processes(wanted: int) -> int:
    """``DATALOADER.NUM_WORKERS``, but no more than this process has cores for; at least 1 of them.

    The cores are shared equally by the processes of this machine that train. Where that changes
    the number, the log says so once.

    Args:
        wanted: number of data loading processes; 0 = none.
    """
    cores, processes = usable_cores(), _local_processes()
    number = min(wanted, max(1, cores // processes))
    if number < wanted:
        log_first_n(
            logging.INFO,
            f"Images are loaded by {pluralize(number, 'process')} instead of {wanted} "
            f"(DATALOADER.NUM_WORKERS): {pluralize(cores, 'core')}, shared by "
            f"{pluralize(processes, 'training process')}",
            name=__name__,
            key="message",
        )
    return number


def usable_cores() -> int:
    """Number of cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _local_processes() -> int:
    """Number of processes of the run on this machine."""
    try:
        return comm.get_local_size()
    except AssertionError:  # Detectron2's main branch, where it has not been told
        return comm.get_world_size()
