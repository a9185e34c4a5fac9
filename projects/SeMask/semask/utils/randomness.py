"""Random numbers that depend only on the position in the run.

Every training step and every training image seeds its own random sequence from the run's seed and
its number. A resumed run therefore draws exactly the same numbers as an uninterrupted one,
regardless of evaluation, prefetching and the number of data loading workers.
"""

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.utils import comm

# The purposes of sequences, which are never seeded alike.
_STEP, _IMAGE, _ORDER = 0, 1, 2


def shared_seed(seed: int) -> int:
    """``SEED`` of a config; if negative, a random seed shared by all processes."""
    if seed >= 0:
        return seed
    return comm.all_gather(int.from_bytes(os.urandom(4), "little"))[0]


def seed_step(seed: int, iteration: int, rank: int, part: int = 0) -> None:
    """Seed the sequence of a training step, on all devices.

    Args:
        seed: of the run, not negative.
        iteration: number of the step.
        rank: of the process.
        part: number of the batch within the step, if gradients are accumulated.
    """
    words = _words(_STEP, seed, iteration, rank, part)
    random.seed(words[0])
    np.random.seed([words[1] % 2**32, words[1] >> 32])
    torch.manual_seed(words[2])


@contextlib.contextmanager
def image_randomness(seed: int, position: int) -> Iterator[None]:
    """A context with the random sequence of a training image; restores the previous state on exit.

    Args:
        seed: of the run, not negative.
        position: index of the image in the order of the run.
    """
    words = _words(_IMAGE, seed, position)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):  # CPU only: images are not processed on GPUs
        random.seed(words[0])
        np.random.seed([words[1] % 2**32, words[1] >> 32])
        torch.default_generator.manual_seed(words[2])
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def shuffled(size: int, seed: int, number: int) -> list[int]:
    """The numbers 0..size-1 in the random order of epoch ``number`` over a dataset."""
    generator = np.random.default_rng(_words(_ORDER, seed, number))
    return generator.permutation(size).tolist()


def _words(*key: int) -> list[int]:
    """Hash a few small numbers to three 64-bit seeds."""
    return [int(word) for word in np.random.SeedSequence(key).generate_state(3, np.uint64)]
