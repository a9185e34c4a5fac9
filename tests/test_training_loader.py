"""The stream of training batches: the same from any position, with any number of workers."""

import itertools
import os
import random
import signal
import time
from multiprocessing import active_children
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from semask.data import training_loader
from semask.data.training_loader import TrainingLoader
from semask.data.unreadable import SKIPPED, ReadableDataset
from semask.errors import UnreadableError
from semask.utils.randomness import image_randomness, seed_step, shared_seed, shuffled

IMAGES = 5


class Draws(Dataset[dict[str, Any]]):
    """Each sample returns its index, its process, and a number of every generator."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "draws": (random.random(), np.random.rand(), torch.rand(()).item()),
            "process": os.getpid(),
        }


Sample = tuple[int, tuple[float, float, float]]


def batches(count: int, *, start: int = 0, **options: Any) -> list[list[Sample]]:
    loader = TrainingLoader(Draws(), **{"images_per_step": 4, "seed": 3, **options})
    loader.position = start
    found = itertools.islice(loader, count)
    return [[(sample["index"], sample["draws"]) for sample in batch] for batch in found]


def flat(parts: list[list[Sample]]) -> list[Sample]:
    return [sample for part in parts for sample in part]


def test_every_image_comes_once_in_each_pass_in_another_order() -> None:
    indices = [index for index, _ in flat(batches(10))]
    passes = [indices[i : i + IMAGES] for i in range(0, len(indices), IMAGES)]
    assert all(sorted(each) == list(range(IMAGES)) for each in passes)
    assert len({tuple(each) for each in passes}) > 3


def test_every_image_has_its_own_random_numbers() -> None:
    draws = [value for _, values in flat(batches(10)) for value in values]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("workers", [1, 2])
def test_data_loading_processes_change_nothing(workers: int) -> None:
    assert batches(6, num_workers=workers) == batches(6)


def test_seed_decides() -> None:
    assert batches(3) == batches(3)
    assert batches(3, seed=4) != batches(3)


@pytest.mark.parametrize("start", [4, 12])
def test_goes_on_from_any_place(start: int) -> None:
    assert batches(3, start=start) == batches(6)[start // 4 : start // 4 + 3]


@pytest.mark.parametrize(("processes", "parts"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_and_parts_share_the_same_steps(processes: int, parts: int) -> None:
    steps = 3
    of_rank = [
        batches(steps * parts, world_size=processes, rank=rank, accumulate_steps=parts)
        for rank in range(processes)
    ]
    together = [flat([part[i] for part in of_rank]) for i in range(steps * parts)]
    for step, expected in enumerate(batches(steps)):
        assert flat(together[step * parts : (step + 1) * parts]) == expected


def test_position_counts_whole_steps() -> None:
    loader = TrainingLoader(Draws(), images_per_step=4, accumulate_steps=2, seed=1)
    stream = iter(loader)
    positions = []
    for _ in range(5):
        next(stream)
        positions.append(loader.position)
    assert positions == [0, 4, 4, 8, 8]
    other = TrainingLoader(Draws(), images_per_step=4, accumulate_steps=2)
    other.load_state_dict(loader.state_dict())
    assert (other.seed, other.position) == (1, 8)


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 images.* 3\b"):
        TrainingLoader(Draws(), images_per_step=4, world_size=3)


def test_the_generators_of_this_process_stay_as_they_were() -> None:
    def states() -> tuple[Any, ...]:
        legacy: Any = np.random.get_state(legacy=True)
        return random.getstate(), legacy[1].tolist(), torch.get_rng_state().tolist()

    def use_and_fail() -> None:
        with image_randomness(1, 3):
            torch.rand(1)
            np.random.rand()
            random.random()
            raise ZeroDivisionError

    before = states()
    with image_randomness(1, 2), pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert states() == before


def test_steps_processes_and_parts_differ() -> None:
    seen = set()
    for key in [(1, 2, 3, 4), (1, 2, 4, 3), (2, 1, 3, 4), (1, 2, 3, 5)]:
        for _ in range(2):
            seed_step(*key)
            seen.add((random.random(), np.random.rand(), torch.rand(()).item()))
    assert len(seen) == 4
    assert shuffled(50, 1, 2) != shuffled(50, 2, 1)


def test_a_seed_is_drawn_where_none_is_given() -> None:
    assert shared_seed(7) == 7
    drawn = {shared_seed(-1) for _ in range(5)}
    assert len(drawn) == 5
    assert min(drawn) >= 0


def test_unreadable_images_are_replaced_and_noted() -> None:
    def mapper(record: dict[str, Any]) -> dict[str, Any]:
        if record["file_name"] == "2.png":
            raise UnreadableError("2.png is damaged")
        return dict(record)

    records = [{"file_name": f"{index}.png"} for index in range(IMAGES)]
    loader = TrainingLoader(
        ReadableDataset(records, mapper, 1), images_per_step=IMAGES, max_unreadable=1
    )
    (batch,) = itertools.islice(loader, 1)
    names = [sample["file_name"] for sample in batch]
    assert sorted(names) == ["0.png", "1.png", "3.png", "3.png", "4.png"]
    assert loader.unreadable.reasons == {"2.png": "2.png is damaged"}
    assert all(SKIPPED not in sample for sample in batch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_data_loading_processes_outlive_a_signal_to_all(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The main process ends them, after it has written its checkpoint, however long that takes."""
    monkeypatch.setattr(training_loader, "LAST_IMAGE_SECONDS", 0.0)
    loader = TrainingLoader(Draws(), images_per_step=2, num_workers=2)
    stream = iter(loader)
    workers = {sample["process"] for _ in range(4) for sample in next(stream)}
    assert os.getpid() not in workers
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, number)
    time.sleep(1.5)  # a slow step
    for _ in range(20):  # more than they had prepared
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not workers & {process.pid for process in active_children()}
