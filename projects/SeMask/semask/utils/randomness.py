"""Random numbers that depend only on the position in the run.

Every training step and every training image starts its own random sequence, from the run's seed
and its number. So a resumed run draws exactly what an undisturbed one would have drawn, whatever
was evaluated or loaded ahead in between, and however many data loading processes there are.
"""

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.utils import comm

# What a sequence is for: these never start the same one.
_STEP, _IMAGE, _ORDER = 0, 1, 2


def shared_seed(seed: int) -> int:
    """``SEED`` of a config; where that is negative, a random one that all processes share."""
    if seed >= 0:
        return seed
    return comm.all_gather(int.from_bytes(os.urandom(4), "little"))[0]


def seed_step(seed: int, iteration: int, rank: int, part: int = 0) -> None:
    """Start the sequence of a training step, on all devices.

    Args:
        seed: the run's, not negative.
        iteration: number of the step.
        rank: process of the run.
        part: number within the step, where gradients are accumulated.
    """
    words = _words(_STEP, seed, iteration, rank, part)
    random.seed(words[0])
    np.random.seed([words[1] % 2**32, words[1] >> 32])
    torch.manual_seed(words[2])


@contextlib.contextmanager
def image_randomness(seed: int, position: int) -> Iterator[None]:
    """A context with the random sequence of a training image; it restores the state after it.

    Args:
        seed: the run's, not negative.
        position: number of the image in the order of the run.
    """
    words = _words(_IMAGE, seed, position)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):  # of the CPU alone: images are not made on GPUs
        random.seed(words[0])
        np.random.seed([words[1] % 2**32, words[1] >> 32])
        torch.default_generator.manual_seed(words[2])
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def shuffled(size: int, seed: int, number: int) -> list[int]:
    """The numbers 0..size-1 in the random order of the pass ``number`` over a dataset."""
    generator = np.random.default_rng(_words(_ORDER, seed, number))
    return generator.permutation(size).tolist()


def _words(*key: int) -> list[int]:
    """Three well mixed 64-bit numbers from a few small ones."""
    return [int(word) for word in np.random.SeedSequence(key).generate_state(3, np.uint64)]
