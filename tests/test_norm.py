"""Batch normalisation across processes equals one process with the whole batch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.utils import comm
from torch import Tensor, nn

import runs
from semask.engine import Trainer
from semask.engine.batch_norm import CpuSyncBatchNorm2d, synchronize_batch_norm
from semask.engine.launch.distributed import wrap_ddp
from semask.engine.launch.ending import StopRequest
from semask.engine.weights import WeightAverage

SIZES = ((2, 5, 4), (1, 3, 7))  # images, height and width in each process


def images(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(n, 3, h, w, generator=generator, dtype=torch.float64).mul(3).add(50).to(dtype)
        for n, h, w in SIZES
    ]


def layer(dtype: torch.dtype = torch.float64, **options: Any) -> CpuSyncBatchNorm2d:
    module = CpuSyncBatchNorm2d(3, **options).to(dtype)
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            module.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    return module


def in_this_process(options: dict[str, Any]) -> dict[str, Any]:
    """Two steps of the layer on this process's images."""
    import torch.distributed as dist

    rank = dist.get_rank()
    norm = layer(**options)
    x = images(options.get("dtype", torch.float64))[rank].requires_grad_()
    for _ in range(2):
        y = norm(x)
    (y.double() ** 3).sum().backward()
    gradients = [p.grad for p in norm.parameters() if p.grad is not None]
    for gradient in gradients:
        dist.all_reduce(gradient)
    evaluated = norm.eval()(x)
    return {
        "output": y.detach(),
        "input gradient": x.grad,
        "gradients": gradients,
        "buffers": dict(norm.named_buffers()),
        "evaluated": evaluated.detach(),
    }


def on_everything(options: dict[str, Any]) -> dict[str, Any]:
    """The same with one plain BatchNorm, over the pixels of all processes."""
    dtype = options.pop("dtype", torch.float64)
    norm = nn.BatchNorm2d(3, **options).to(dtype)
    norm.load_state_dict(layer(dtype, **options).state_dict())
    parts = images(dtype)
    pixels = [part.transpose(0, 1).reshape(3, -1) for part in parts]
    x = torch.cat(pixels, dim=1)[None, :, :, None].contiguous().requires_grad_()
    for _ in range(2):
        y = norm(x)
    (y.double() ** 3).sum().backward()
    result = {
        "gradients": [p.grad for p in norm.parameters()],
        "buffers": dict(norm.named_buffers()),
    }
    counts = [p.shape[1] for p in pixels]
    values = {"output": y, "input gradient": x.grad, "evaluated": norm.eval()(x)}
    for name, value in values.items():
        assert value is not None
        shares = value.detach()[0, :, :, 0].split(counts, dim=1)
        result[name] = [
            share.reshape(3, len(part), *part.shape[2:]).transpose(0, 1)
            for share, part in zip(shares, parts, strict=True)
        ]
    return result


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no parameters": {"affine": False},
    "cumulative": {"momentum": None},
    "no statistics": {"track_running_stats": False},
    "float32": {"dtype": torch.float32, "momentum": 0.3, "eps": 1e-3},
}


def every_case() -> dict[str, Any]:
    return {name: in_this_process(dict(options)) for name, options in CASES.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return runs.together(every_case, folder=tmp_path_factory.mktemp("norm") / "group")


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_with_all_images(results: list[dict[str, Any]], case: str) -> None:
    expected = on_everything(dict(CASES[case]))
    rtol, atol = (1e-3, 1e-2) if case == "float32" else (1e-9, 1e-8)
    for rank, of_all in enumerate(results):
        found = of_all[case]
        for name in ("output", "input gradient", "evaluated"):
            if (case, name) == ("no statistics", "evaluated"):
                continue  # those of its own images then, as in PyTorch
            torch.testing.assert_close(found[name], expected[name][rank], rtol=rtol, atol=atol)
        for name in ("gradients", "buffers"):
            torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol)


def test_alone_it_is_a_batch_norm() -> None:
    x = torch.randn(2, 3, 4, 5)
    plain = nn.BatchNorm2d(3)
    assert torch.equal(CpuSyncBatchNorm2d(3)(x), plain(x))


def test_replaces_layers_on_the_cpu_and_keeps_everything_else() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(nn.SyncBatchNorm(4, eps=0.1, momentum=0.2), nn.ReLU())
    )
    model[1][0].running_mean.fill_(7)  # type: ignore[index]
    model.eval()
    before, names = list(model.parameters()), list(model.state_dict())
    assert synchronize_batch_norm(model) is model
    norm = model[1][0]  # type: ignore[index]
    assert type(norm) is CpuSyncBatchNorm2d
    assert (norm.eps, norm.momentum, norm.training) == (0.1, 0.2, False)
    assert norm.running_mean.tolist() == [7] * 4
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_leaves_layers_elsewhere_alone() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.SyncBatchNorm(4))
    assert type(synchronize_batch_norm(model)[0]) is nn.SyncBatchNorm  # type: ignore[index]
    assert type(synchronize_batch_norm(nn.SyncBatchNorm(2))) is CpuSyncBatchNorm2d


def evaluated_statistics() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of this process's BatchNorm and of its average: before an evaluation, and in it."""
    torch.manual_seed(0)
    model = wrap_ddp(nn.Sequential(nn.BatchNorm2d(3)))
    average = WeightAverage(model, 0.9)
    model(images(torch.float32)[comm.get_rank()])
    average.update()
    found: list[Tensor] = []

    def look(cfg: Any, model: nn.Module, average: WeightAverage) -> dict[str, Any]:
        found.append(model.state_dict()["module.0.running_mean"].clone())
        found.append(average.weights()["0.running_mean"].clone())
        return {}

    own = model.state_dict()["module.0.running_mean"].clone()
    of_average = average.weights()["0.running_mean"].clone()
    trainer: Any = SimpleNamespace(
        **{"iter": 0, "max_iter": 1, "model": model, "ema": average, "_best": {}},
        cfg=SimpleNamespace(MODEL=SimpleNamespace(WEIGHTS="")),
        _stop_request=StopRequest(),
        test_with_average=look,
    )
    Trainer.evaluate(trainer)
    return own, of_average, found[0], found[1]


def test_all_processes_evaluate_with_the_statistics_that_are_saved(tmp_path: Path) -> None:
    first, second = runs.together(evaluated_statistics, folder=tmp_path / "group")
    for own in (0, 1):
        assert not torch.equal(second[own], first[own])
        assert torch.equal(first[own + 2], first[own])
        assert torch.equal(second[own + 2], first[own])
