"""One optimizer step: accumulation, precision, averaging, compilation, and what ends a run."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import Dataset

import tiny
from semask.checkpoint import SeMaskCheckpointer
from semask.config.loading import load_config
from semask.data.training_loader import TrainingLoader
from semask.engine import NonFiniteLossError, WeightAverage
from semask.engine.compilation import CompiledParts, compile_parts
from semask.engine.hooks import PriorLossWatch
from semask.engine.train_step import TrainStep
from semask.engine.weights import BestCheckpoint, best_checkpoints
from semask.errors import ConfigError
from semask.tasks import build_task
from semask.utils.precision import Precision, check_precision

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def storage() -> Iterator[EventStorage]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with EventStorage() as storage:
        yield storage
    torch.set_num_threads(threads)


def config(folder: Path, *overrides: Any) -> CfgNode:
    path = tiny.write_config(folder / "config.yaml")
    return load_config(path, ["MODEL.DEVICE", "cpu", *(str(value) for value in overrides)])


NOT_RANDOM = (
    *("MODEL.SWIN.DROP_PATH_RATE", 0.0, "MODEL.SEMASK.DROPOUT", 0.0),
    *("MODEL.SEM_SEG_HEAD.DROPOUT", 0.0),
)


class RandomImages(Dataset[dict[str, Any]]):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = torch.rand(3, 32, 32).to(self.dtype) * 255, torch.randint(0, 3, (32, 32))
        label[: 4 * index] = 255
        return {"file_name": f"{index}.png", "image": image, "sem_seg": label}


def step_of(
    cfg: CfgNode,
    *,
    parts: int = 1,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    **options: Any,
) -> TrainStep:
    torch.manual_seed(0)
    model = build_model(cfg).to(dtype)
    loader = TrainingLoader(RandomImages(dtype), images_per_step=4, accumulate_steps=parts, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options["compiled"] = CompiledParts(model) if compiled else None
    return TrainStep(model, loader, optimizer, accumulate_steps=parts, **options)


def values(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- accumulation ----


def frozen_norms(step: TrainStep) -> TrainStep:
    """BatchNorm in evaluation mode: it would see each part on its own."""
    for module in step.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return step


@pytest.mark.parametrize("reduction", ["all", "valid"])
def test_accumulated_parts_equal_the_large_batch(
    tmp_path: Path, storage: EventStorage, reduction: str
) -> None:
    cfg = config(tmp_path, *NOT_RANDOM, "MODEL.SEM_SEG_HEAD.LOSS_REDUCTION", reduction)
    whole = frozen_norms(step_of(cfg, dtype=torch.float64))
    losses = []
    for parts in (1, 2, 4):
        step = frozen_norms(step_of(cfg, parts=parts, dtype=torch.float64))
        for step.iter in range(2):
            step.run_step()
        losses.append([storage.latest()[name][0] for name in ("loss_sem_seg", "loss_prior")])
        if parts == 1:
            whole = step
            continue
        torch.testing.assert_close(values(step.model), values(whole.model), rtol=0, atol=1e-9)
        for own, other in zip(step.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)
        assert losses[-1] == pytest.approx(losses[0], rel=1e-12)


# ---- precision ----


def test_bfloat16_on_the_cpu(tmp_path: Path, storage: EventStorage) -> None:
    on = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16")
    cfg = config(tmp_path, *NOT_RANDOM, *on)
    single, mixed = step_of(cfg), step_of(cfg, precision=Precision.from_config(cfg))
    seen: list[torch.dtype] = []
    mixed.model.sem_seg_head.semantic_fpn.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.dtype)
    )
    losses = []
    for step in (single, mixed):
        step.run_step()
        losses.append(storage.latest()["total_loss"][0])
    assert seen == [torch.bfloat16]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    assert mixed.state_dict()["precision"] == {}


def test_float16_leaves_out_a_step_that_overflows() -> None:
    precision = Precision("cpu", torch.float16)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = values(model)
    scale = precision.state_dict()["scale"]

    def step(factor: float) -> None:
        optimizer.zero_grad()
        precision.backward((model.weight * factor).sum())
        precision.step(optimizer)

    step(float("inf"))
    assert torch.equal(model.weight, before["weight"])
    assert precision.state_dict()["scale"] == scale / 2
    step(2.0)  # the scale is taken out of the gradient again
    assert torch.allclose(model.weight, before["weight"] - 1.0)

    other = Precision("cpu", torch.float16)
    other.load_state_dict(precision.state_dict())
    assert other.state_dict() == precision.state_dict()
    Precision().load_state_dict(precision.state_dict())  # a run that goes on without
    other.load_state_dict({})


def test_bfloat16_needs_a_gpu_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path, "SOLVER.AMP.ENABLED", True)
    cfg.MODEL.DEVICE = "cuda"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    check_precision(cfg)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="'float16'"):
        check_precision(cfg)
    cfg.MODEL.DEVICE = "mps"
    with pytest.raises(ConfigError, match="'mps'"):
        check_precision(cfg)


# ---- compilation ----


def with_backend(backend: Any) -> Callable[..., Any]:
    compiler = torch.compile
    return lambda function, **options: compiler(function, backend=backend, **options)


def placeholders(cfg: CfgNode) -> list[dict[str, Any]]:
    task = build_task(cfg)
    return task.placeholder_inputs(task.training_size(), 2)


@pytest.mark.slow
def test_compiled_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", with_backend(backend))
    cfg = config(tmp_path, "INPUT.CROP.SIZE", "[32, 32]")
    step, plain = step_of(cfg), step_of(cfg)
    before, names = values(step.model), list(step.model.state_dict())
    compiled = compile_parts(step.model, placeholders(cfg), Precision())
    assert isinstance(compiled, CompiledParts)
    assert calls
    torch.testing.assert_close(values(step.model), before, rtol=0, atol=0)
    assert all(p.grad is None for p in step.model.parameters())
    step = step_of(cfg, compiled=True)
    step.run_step()
    plain.run_step()
    assert list(step.model.state_dict()) == names
    torch.testing.assert_close(values(step.model), values(plain.model), rtol=1e-4, atol=1e-5)
    calls.clear()
    step.model.eval()
    step.model([RandomImages()[0]])  # evaluation runs as it was written
    assert not calls


def test_without_a_working_compiler_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def backend(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", with_backend(backend))
    cfg = config(tmp_path)
    step = step_of(cfg)
    before = values(step.model)
    with caplog.at_level(logging.WARNING, "semask"):
        assert compile_parts(step.model, placeholders(cfg), Precision()) is None
    (record,) = [record for record in caplog.records if record.name.startswith("semask")]
    assert "torch.compile failed" in record.getMessage()
    assert "no C++ compiler here" in record.getMessage()
    torch.testing.assert_close(values(step.model), before, rtol=0, atol=0)
    step.run_step()


# ---- what ends or accompanies a run ----


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(tmp_path: Path) -> None:
    step = step_of(config(tmp_path), output_dir=str(tmp_path))
    step.run_step()
    before = values(step.model)
    step.iter = 7
    with torch.no_grad():
        step.model.sem_seg_head.semantic_fpn.predictor.bias[0] = float("nan")
    parameters = {name: p.clone() for name, p in step.model.named_parameters()}
    with pytest.raises(NonFiniteLossError) as caught:
        step.run_step()
    report = json.loads((tmp_path / "nonfinite_batch.json").read_text())
    (batch,) = report["batches"]
    assert report["iteration"] == 7
    assert batch["process"] == 0
    assert batch["losses"]["loss_sem_seg"] == "nan"
    assert float(batch["losses"]["loss_prior"]) > 0
    assert len(set(batch["files"])) == 4
    for part in ("iteration 7", "loss_sem_seg = nan", *batch["files"], "nonfinite_batch.json"):
        assert part in str(caught.value)
    for name, value in step.model.named_parameters():
        torch.testing.assert_close(value, parameters[name], rtol=0, atol=0, equal_nan=True)
    assert before.keys() == values(step.model).keys()


class FakeTrainer:
    def __init__(self, storage: EventStorage) -> None:
        self.storage = storage
        self.iter = 0


def test_a_prior_loss_of_zero_is_pointed_out_once(
    storage: EventStorage, caplog: pytest.LogCaptureFixture
) -> None:
    watch = PriorLossWatch(patience=3)
    watch.trainer = FakeTrainer(storage)
    with caplog.at_level(logging.WARNING, "semask"):
        for iteration, loss in enumerate([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, *[0.0] * 9]):
            watch.trainer.iter = storage.iter = iteration
            storage.put_scalar("loss_prior", loss)
            watch.after_step()
            assert len(caplog.records) == (iteration >= 5)
    assert " 3 iterations" in caplog.text


def test_without_a_prior_loss_nothing_is_watched(
    storage: EventStorage, caplog: pytest.LogCaptureFixture
) -> None:
    watch = PriorLossWatch(patience=1)
    watch.trainer = FakeTrainer(storage)
    watch.after_step()
    storage.put_scalar("loss_prior", 0.0)
    watch.trainer.iter = 5  # that one is old
    watch.after_step()
    assert not caplog.records


# ---- averaged weights ----


def test_average_of_the_weights() -> None:
    model = nn.BatchNorm1d(1)
    average = WeightAverage(model, decay=0.5)
    assert not average.started
    expected: float | None = None
    for step, value in enumerate([1.0, 3.0, 5.0, -2.0, 8.0, 0.0, 4.0, 1.0, 9.0, 2.0, 6.0]):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(2 * value)
            model.num_batches_tracked.fill_(step)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    weights = average.weights()
    assert weights["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert weights["running_mean"].item() == pytest.approx(2 * (expected or 0), rel=1e-5)
    assert weights["num_batches_tracked"].item() == 10

    before = values(model)
    with average.applied():
        assert torch.equal(model.weight, weights["weight"])
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    with pytest.raises(ZeroDivisionError), average.applied():
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_average_goes_through_a_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    SeMaskCheckpointer(model, str(tmp_path), ema=average).save("early")  # before the first step
    average.update()
    nn.init.ones_(model.weight)
    average.update()
    SeMaskCheckpointer(model, str(tmp_path), ema=average).save("later")
    content = torch.load(tmp_path / "later.pth", weights_only=True)["ema"]

    other = WeightAverage(model, 0.9)
    other.load_state_dict(torch.load(tmp_path / "early.pth", weights_only=True)["ema"])
    assert not other.started
    other.load_state_dict(content)
    for one in (average, other):
        one.update()
    for name, value in average.weights().items():
        assert torch.equal(value, other.weights()[name])
    with pytest.raises(ValueError, match="of another model"):
        WeightAverage(nn.Linear(3, 2), 0.9).load_state_dict(content)


# ---- best checkpoint ----


def test_best_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = BestCheckpoint(str(tmp_path), "model_best", "sem_seg/mIoU")
    best.restore()  # nothing there

    def kept() -> tuple[int, float]:
        content = torch.load(best.path, weights_only=True)
        assert content["model"]["w"].item() == content["iteration"]
        return content["iteration"], content["value"]

    def update(step: int, value: float) -> None:
        best.update({"sem_seg/mIoU": value}, {"w": torch.tensor(step)}, step)

    update(1, float("nan"))
    assert not Path(best.path).exists()
    for step, value in enumerate([30.0, 20.0, 35.0, 35.0], start=2):
        update(step, value)
    assert kept() == (4, 35.0)
    assert not (tmp_path / "last_checkpoint").exists()

    best = BestCheckpoint(str(tmp_path), "model_best", "sem_seg/mIoU")
    best.restore()
    update(9, 34.0)
    assert kept() == (4, 35.0)
    best.update({"other": 1.0}, {}, 10)
    assert "'sem_seg/mIoU' (other)" in caplog.text

    other = BestCheckpoint(str(tmp_path), "model_best", "sem_seg/pACC")
    other.restore()  # what it holds is not to be compared with
    other.update({"sem_seg/pACC": 1.0}, {"w": torch.tensor(12)}, 12)
    assert kept() == (12, 1.0)

    Path(best.path).write_bytes(b"broken")
    best = BestCheckpoint(str(tmp_path), "model_best", "sem_seg/mIoU")
    best.restore()
    assert "cannot be used" in caplog.text
    update(11, 1.0)
    assert kept() == (11, 1.0)


def test_which_best_checkpoints_there_are(tmp_path: Path) -> None:
    def metrics(*overrides: Any) -> dict[str, str]:
        found = best_checkpoints(config(tmp_path, *overrides))
        return {name: best.metric for name, best in found.items()}

    assert metrics() == {"model_best": "sem_seg/mIoU"}
    assert metrics("TEST.BEST_METRIC", "") == {}
    assert metrics("DATASETS.TEST", "()") == {}
    two = ("DATASETS.TEST", "('a', 'b')", "SOLVER.EMA.ENABLED", True)
    assert metrics(*two) == {
        "model_best": "a/sem_seg/mIoU",
        "model_best_ema": "ema/a/sem_seg/mIoU",
    }
