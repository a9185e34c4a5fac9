"""Losses of masks over two processes against those of one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from semask.modeling.losses import (
    Mask2FormerCriterion,
    Mask2FormerMatcher,
    MaskCriterion,
    MaskFormerCriterion,
    MaskFormerMatcher,
    MaskTarget,
)
from semask.modeling.mask_decoder import MaskPrediction

CLASSES = 4


def criterion(kind: str) -> MaskCriterion:
    if kind == "maskformer":
        return MaskFormerCriterion(matcher=MaskFormerMatcher())
    return Mask2FormerCriterion(matcher=Mask2FormerMatcher(num_points=64), num_points=64)


def image(index: int, num_targets: int) -> tuple[list[MaskPrediction], MaskTarget]:
    """Two decoder layers' predictions for an image, and its targets."""
    generator = torch.Generator().manual_seed(index)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layers = [MaskPrediction(random(1, 7, CLASSES + 1), random(1, 7, 8, 8)) for _ in range(2)]
    labels = torch.randint(0, CLASSES, (num_targets,), generator=generator)
    return layers, MaskTarget(labels, random(num_targets, 32, 32) > 0)


def losses(kind: str, images: list[tuple[list[MaskPrediction], MaskTarget]]) -> dict[str, Tensor]:
    """The losses of a batch, with the same random points for every mask and image."""

    def rand(count: int, *shape: int, dtype: torch.dtype, device: Any) -> Tensor:
        points = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        return points.sigmoid().to(device, dtype).expand(count, *shape)

    layers = [
        MaskPrediction(*(torch.cat(parts) for parts in zip(*predictions, strict=True)))
        for predictions in zip(*(layers for layers, _ in images), strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        return criterion(kind)(layers, [target for _, target in images])


KINDS = ("maskformer", "mask2former")
NUMBERS = ((3, 5), (4, 0), (0, 0))  # of targets in the two images


def process(rank: int, folder: str) -> None:
    """One of two processes, with one of two images."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    own = {
        (kind, numbers): losses(kind, [image(rank, numbers[rank])])
        for kind in KINDS
        for numbers in NUMBERS
    }
    dist.destroy_process_group()
    torch.save(own, f"{folder}/{rank}.pth")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The losses of both processes."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mean_over_processes_equals_one_process(
    kind: str, numbers: tuple[int, int], ranks: list[Any]
) -> None:
    first, second = (own[kind, numbers] for own in ranks)
    together = losses(kind, [image(rank, number) for rank, number in enumerate(numbers)])
    alone = [losses(kind, [image(rank, number)]) for rank, number in enumerate(numbers)]
    assert set(first) == set(together)
    for name, want in together.items():
        if name.startswith("loss_ce"):  # a weighted mean over the queries of a process
            want = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close((first[name] + second[name]) / 2, want, msg=name)
