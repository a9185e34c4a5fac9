"""Mask-classification models in training: whole runs, and the parameters that a step changes."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

import runs
import tiny
import tiny_masks
import train_command
from semask.cli import main
from semask.config import load_config
from semask.engine import Trainer, wrap_ddp
from semask.engine.compilation import compile_parts
from semask.engine.train_step import TrainStep
from semask.modeling.losses.divisor import shares
from semask.modeling.meta_arch.targets import class_masks
from semask.solver import build_optimizer
from semask.utils.precision import Precision
from tiny_masks import CLASSES, DECODERS, batch, build, config
from tiny_runs import Batches, assert_same_state


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., int]]:
    with tiny.datasets(tmp_path), tiny.own_loggers():
        yield functools.partial(train_command.run, tmp_path)


def losses_of(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [line for line in lines if "total_loss" in line]


def checkpoint(folder: Path, name: str = "model_final") -> dict[str, Any]:
    return torch.load(folder / f"{name}.pth", weights_only=True)


# ---- whole runs ----


@pytest.mark.parametrize("decoder", DECODERS)
def test_training_with_evaluation_and_report(
    tmp_path: Path, command: Callable[..., int], decoder: str
) -> None:
    out = tmp_path / "out"
    assert command(config=tiny_masks.write_config(tmp_path / "config.yaml", decoder)) == 0
    (losses,) = losses_of(out)
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_ce_1", "loss_prior"} <= set(losses)
    folder = out / "inference" / "tiny_val"
    results = json.loads((folder / "sem_seg_evaluation.json").read_text())["results"]
    assert 0 <= results["mIoU"] <= 100
    assert (folder / "report.html").is_file()
    assert (out / "panels.png").is_file()
    plotted = str(tmp_path / "curves.png")
    assert main.run("plot", [f"{decoder}={out}", "--output", plotted]) == 0
    assert Path(plotted).stat().st_size > 0
    assert main.run("check", ["--config", str(tmp_path / "config.yaml")]) == 0


# Dropout, stochastic depth, random points and every augmentation are on.
LONG = (
    *("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.EMA.ENABLED", True),
    *("INPUT.RANDOM_FLIP", "horizontal", "MODEL.MASK_FORMER.DROPOUT", 0.1),
    *("TEST.NUM_PANELS", 0, "TEST.REPORT", False, "TEST.EVAL_PERIOD", 2),
)


@pytest.mark.parametrize("decoder", ["maskformer", "mask2former"])
def test_a_resumed_run_is_the_same_bit_for_bit(
    tmp_path: Path, command: Callable[..., int], decoder: str
) -> None:
    file = tiny_masks.write_config(tmp_path / "config.yaml", decoder)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(*LONG, "OUTPUT_DIR", whole, config=file) == 0
    # What a run that ended after two steps leaves.
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("model_*", "inference"))
    shutil.copy(whole / "model_0000001.pth", stopped)
    (stopped / "last_checkpoint").write_text("model_0000001.pth")
    assert command("--resume", *LONG, "OUTPUT_DIR", stopped, config=file) == 0
    first, second = checkpoint(whole), checkpoint(stopped)
    assert_same_state(first, second)
    start = checkpoint(whole, "model_0000001")["model"]
    assert any(not torch.equal(value, first["model"][name]) for name, value in start.items())
    averaged = first["ema"]["model"]
    learnt = "sem_seg_head.predictor.class_embed.weight"
    assert not torch.equal(averaged[learnt], first["model"][learnt])


@pytest.mark.parametrize("decoder", DECODERS)
def test_mixed_precision_and_accumulation(
    tmp_path: Path, command: Callable[..., int], decoder: str
) -> None:
    options = (
        *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"),
        *("TEST.AMP.ENABLED", True, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.IMS_PER_BATCH", 4),
    )
    file = tiny_masks.write_config(tmp_path / "config.yaml", decoder)
    assert command(*options, config=file) == 0
    weights = checkpoint(tmp_path / "out")["model"]
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {
        torch.float32
    }
    assert all(value.isfinite().all() for value in weights.values())


def test_the_mapper_of_label_maps_trains_the_same_masks(
    tmp_path: Path, command: Callable[..., int]
) -> None:
    """The masks are derived from the label maps where the mapper makes none."""
    file = tiny_masks.write_config(tmp_path / "config.yaml")
    assert command("INPUT.DATASET_MAPPER_NAME", "sem_seg", config=file) == 0
    (losses,) = losses_of(tmp_path / "out")
    assert losses["loss_mask"] > 0


def test_masks_derived_from_label_maps_are_those_of_the_mapper() -> None:
    model = build("maskformer").train()
    samples = batch((40, 70), (64, 50), empty=(1,))
    without = [{k: v for k, v in each.items() if k != "instances"} for each in samples]
    losses = []
    for inputs in (samples, without):
        torch.manual_seed(0)
        losses.append(model(inputs))
    torch.testing.assert_close(dict(losses[1]), dict(losses[0]))


# ---- matching that fails ----


def test_matching_that_meets_nan_ends_the_run_at_that_step(
    tmp_path: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_step = Trainer.run_step

    def with_a_broken_weight(self: Trainer) -> None:
        if self.iter == 2:
            nn.init.constant_(self.model.sem_seg_head.predictor.class_embed.bias, float("inf"))
        run_step(self)

    monkeypatch.setattr(Trainer, "run_step", with_a_broken_weight)
    file = tiny_masks.write_config(tmp_path / "config.yaml")
    assert command("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, config=file) == 1
    out, printed = tmp_path / "out", "".join(capsys.readouterr())
    report = json.loads((out / "nonfinite_batch.json").read_text())
    assert report["iteration"] == 2
    (told,) = report["batches"]
    assert len(told["files"]) == 2
    assert all(file in printed for file in told["files"])
    assert "NaN" in printed
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"


# ---- two processes, and parts of a step ----


def same_points(count: int, *shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
    """A replacement of ``torch.rand``: the same points for every mask, image and process."""
    points = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return points.sigmoid().to(device, dtype).expand(count, *shape)


def four_images(equal: bool) -> list[dict[str, Any]]:
    """Images with the same masks each; or with other numbers of masks and of valid pixels."""
    (sample,) = batch((64, 64))
    samples = []
    for i in range(4):
        label = sample["sem_seg"].clone()
        if not equal:
            label[label < i] = 255  # the last image has one mask of five
            label[: 16 * i] = 255
        samples.append(
            {
                "file_name": f"{i}.png",
                "image": sample["image"].roll(9 * i, dims=2),
                "sem_seg": label,
                "instances": class_masks(label, 255),
            }
        )
    assert equal or len({len(each["instances"]) for each in samples}) > 2
    return samples


def trained(decoder: str, parts: int = 1, equal: bool = True) -> dict[str, Any]:
    """Two steps of this process's share of four images."""
    torch.manual_seed(0)
    model = build_model(
        config(decoder, SEMASK__DROPOUT=0.0, MASK_FORMER__DROPOUT=0.0, DEVICE="cpu")
    ).double()
    share = four_images(equal)[comm.get_rank() :: comm.get_world_size()]
    wrapped = wrap_ddp(model)
    own = [share[part::parts] for part in range(parts)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = TrainStep(wrapped, Batches(own * 2), optimizer, accumulate_steps=parts)  # type: ignore[arg-type]
    with EventStorage() as storage, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", same_points)
        for step.iter in range(2):
            step.run_step()
        losses = {name: value for name, (value, _) in storage.latest().items() if "loss" in name}
    return {"losses": losses, "state": dict(model.state_dict())}


TWO = ("maskformer", "mask2former")


def every_decoder() -> dict[str, Any]:
    return {decoder: trained(decoder) for decoder in TWO}


def of_each_process() -> dict[Any, Any]:
    in_parts = {
        (decoder, parts): trained(decoder, parts, equal=False)
        for decoder in TWO
        for parts in (1, 2)
    }
    return {**every_decoder(), **in_parts}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return runs.together(of_each_process, folder=tmp_path_factory.mktemp("two") / "group")


@pytest.fixture(scope="module")
def of_one() -> dict[str, Any]:
    return every_decoder()


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-8, atol=1e-10)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-8)


@pytest.mark.parametrize("decoder", TWO)
def test_two_processes_equal_one(
    decoder: str, of_one: dict[str, Any], of_two: list[dict[Any, Any]]
) -> None:
    assert_same_training(of_two[0][decoder], of_one[decoder])
    torch.testing.assert_close(of_two[1][decoder]["state"], of_two[0][decoder]["state"])


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("decoder", TWO)
def test_a_step_in_parts_equals_one_at_once(decoder: str, parts: int) -> None:
    """Images with different numbers of masks, and of pixels for the priors."""
    whole = trained(decoder, equal=False)
    assert_same_training(trained(decoder, parts, equal=False), whole)


@pytest.mark.parametrize("decoder", TWO)
def test_a_step_in_parts_of_two_processes_equals_one_at_once(
    decoder: str, of_two: list[dict[Any, Any]]
) -> None:
    assert_same_training(of_two[0][decoder, 2], of_two[0][decoder, 1])


def test_a_part_without_masks_has_no_share_of_their_losses() -> None:
    model = build().train()
    samples = batch((64, 64), (64, 64), (64, 64), empty=(0, 2))
    parts = [model.loss_divisors(samples[:1]), model.loss_divisors(samples[1:])]
    first, second = shares(parts)
    assert second["loss_mask"] == second["loss_prior"] == 1.0
    # Six queries of "no object", against twelve of which each class has one.
    assert first["loss_ce"] == pytest.approx(0.6 / (0.6 + 0.1 * (12 - CLASSES) + CLASSES))
    assert first["loss_ce"] + second["loss_ce"] == pytest.approx(1.0)


# ---- optimizer ----


def groups_of(tmp_path: Path, decoder: str) -> tuple[nn.Module, dict[str, tuple[float, float]]]:
    """A model, and learning rate and weight decay by the name of the parameter."""
    solver = {"BACKBONE_MULTIPLIER": 0.1, "WEIGHT_DECAY": 0.05, "BASE_LR": 1e-4}
    cfg = load_config(tiny_masks.write_config(tmp_path / "config.yaml", decoder, SOLVER=solver))
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    found = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return model, {name: found[p] for name, p in model.named_parameters()}


@pytest.mark.parametrize("decoder", DECODERS)
def test_published_groups_by_name(tmp_path: Path, decoder: str) -> None:
    """Spec-masks E.1: norms, embeddings and position tables do not decay; all else does."""
    _, groups = groups_of(tmp_path, decoder)
    for name, (lr, decay) in groups.items():
        assert lr == pytest.approx(1e-5 if name.startswith("backbone.") else 1e-4), name
        owner = name.split(".")[:-1]
        spared = (
            any("norm" in part for part in owner)
            or name.endswith("relative_position_bias_table")
            or owner[-1] in ("query_feat", "query_embed")
            or name == "sem_seg_head.predictor.level_embed.weight"
            or ("input_proj" in owner and owner[-1] == "1")  # a projection's norm
        )
        assert decay == (0.0 if spared else 0.05), name
    decaying = {name for name, (_, decay) in groups.items() if decay}
    for part in ("gamma", "class_embed.bias", "mask_embed.layers.0.bias", "in_proj_bias"):
        assert any(name.endswith(part) for name in decaying), part
    if decoder in ("mask2former", "mask2former_msfapn"):
        prefix = "sem_seg_head.pixel_decoder.transformer."
        assert f"{prefix}level_embed" in decaying
        assert f"{prefix}encoder.layers.0.self_attn.sampling_offsets.bias" in decaying


def test_the_gradients_of_the_whole_model_are_clipped_together(tmp_path: Path) -> None:
    head = {"SEM_SEG_HEAD": {"NUM_CLASSES": CLASSES}}
    cfg = load_config(tiny_masks.write_config(tmp_path / "config.yaml", MODEL=head))
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    torch.stack(list(model(batch((64, 64))).values())).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in before.values()]).norm()
    assert norm > 1
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name] * (0.01 / norm), rtol=1e-3, atol=0)


# ---- parts of the backbone ----


def test_frozen_stages_do_not_learn() -> None:
    model = build(SWIN__FREEZE_AT=2).train()
    torch.stack(list(model(batch((64, 64))).values())).sum().backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith("backbone.") for name in frozen)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name


@pytest.mark.parametrize("decoder", ["maskformer", "mask2former"])
def test_recomputing_activations_changes_no_gradient(decoder: str) -> None:
    results = []
    for recompute in (False, True):
        model = build(
            decoder, SWIN__ACTIVATION_CHECKPOINT=[recompute] * 4, MASK_FORMER__DROPOUT=0.0
        ).train()
        torch.manual_seed(0)
        torch.stack(list(model(batch((64, 64))).values())).sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")  # the matching runs as it is
def test_compiled_training_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiler(function, backend=backend, **options)
    )
    model = build("maskformer", SEMASK__DROPOUT=0.0, MASK_FORMER__DROPOUT=0.0).train()
    samples = batch((64, 64), (64, 64))
    parts = compile_parts(model, samples, Precision())
    assert parts is not None
    assert graphs
    expected = model(samples)
    with parts.active():
        losses = model(samples)
    torch.testing.assert_close(dict(losses), dict(expected), rtol=1e-4, atol=1e-5)
