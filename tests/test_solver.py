"""Weight decay groups, optimizers and learning rates against the published recipes."""

import json
import pickle
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from reference import CASES, FIXTURES, Model
from semask.checkpoint import convert_state_dict
from semask.config.loading import load_config
from semask.errors import ConfigError
from semask.solver import WarmupPoly, build_lr_scheduler, build_optimizer, parameter_groups
from semask.utils.precision import Precision


def recipe(case: str) -> dict[str, Any]:
    return json.loads((FIXTURES / "training.json").read_text())[case]


def config(*overrides: object) -> CfgNode:
    return load_config("", [str(value) for value in overrides])


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.batch_norm = nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm(4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 1))
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, 4, 2, 2))
        self.gamma = nn.Parameter(torch.zeros(1))
        self.tied = nn.Conv2d(3, 4, 1)
        self.tied.weight = self.conv.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def group_names(model: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [sorted(names[parameter] for parameter in group["params"]) for group in groups]


def test_groups_of_a_small_module() -> None:
    model = Toy()
    groups = parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert group_names(model, groups) == [
        ["batch_norm.bias", "batch_norm.weight", "conv.bias", "conv.weight", "gamma", "tied.bias"],
        ["absolute_pos_embed", "layer_norm.bias", "layer_norm.weight"]
        + ["relative_position_bias_table"],
    ]


def test_a_group_without_parameters_is_left_out() -> None:
    assert [len(g["params"]) for g in parameter_groups(nn.Linear(2, 2), 0.1)] == [2]
    assert parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1) == []


class ToyMaskModel(nn.Module):
    """Parameters of every kind that the mask-classification recipes tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4)})
        self.head = nn.ModuleDict(
            {
                "group_norm": nn.GroupNorm(2, 4),
                "query": nn.Embedding(3, 4),
                "conv": nn.Conv2d(3, 4, 1),
            }
        )
        self.head.batch_norm = nn.BatchNorm2d(4)
        self.level_embed = nn.Parameter(torch.zeros(3, 4))


EVERY_NORM = ["layer_norm", "group_norm", "batch_norm", "embedding", "position"]


def test_groups_of_the_mask_classification_recipes() -> None:
    cfg = config("SOLVER.NO_DECAY", EVERY_NORM, "SOLVER.BACKBONE_MULTIPLIER", 0.1)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 1e-4, 0.05
    model = ToyMaskModel()
    optimizer = build_optimizer(cfg, model)
    found = {
        (group["lr"], group["weight_decay"]): names
        for group, names in zip(
            optimizer.param_groups, group_names(model, optimizer.param_groups), strict=True
        )
    }
    assert found == {
        (1e-4, 0.05): ["head.conv.bias", "head.conv.weight", "level_embed"],
        (1e-4, 0.0): [
            *("head.batch_norm.bias", "head.batch_norm.weight"),
            *("head.group_norm.bias", "head.group_norm.weight", "head.query.weight"),
        ],
        (1e-5, 0.05): ["backbone.linear.bias", "backbone.linear.weight"],
        (1e-5, 0.0): ["backbone.norm.bias", "backbone.norm.weight"],
    }


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_full_model_clipping_scales_all_gradients_alike(scale: float) -> None:
    cfg = config("SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0, "SOLVER.BASE_LR", 1.0)
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.01
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = [scale * torch.randn_like(parameter) for parameter in before]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    build_optimizer(cfg, model).step()
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    factor = min(1.0, 0.01 / float(norm))
    for parameter, start, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(start - parameter, factor * gradient, rtol=1e-3, atol=1e-6)


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, fused=True)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(parameter.grad.clone()))
    precision = Precision("cpu", torch.float16)
    precision.backward(parameter.sum())
    precision.step(optimizer)
    torch.testing.assert_close(seen, [torch.ones(4)])


def test_an_unknown_kind_of_parameters_or_clipping_is_named() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.NO_DECAY.*'norms'"):
        build_optimizer(config("SOLVER.NO_DECAY", ["norms"]), Toy())
    cfg = config("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all")
    with pytest.raises(ConfigError, match=r"CLIP_TYPE.*'all'"):
        build_optimizer(cfg, Toy())


@pytest.mark.parametrize("case", CASES)
def test_groups_have_the_published_names(case: str) -> None:
    expected = recipe(case)
    with torch.device("meta"):
        model = Model(case)
    # The reference's names, carried through the conversion, are this project's.
    published = {name: torch.empty(0) for name in expected["no_weight_decay"]}
    converted, _ = convert_state_dict(published)
    decay, no_decay = group_names(model, parameter_groups(model, expected["weight_decay"]))
    assert no_decay == sorted(converted)
    assert len(decay) == expected["weight_decay_parameters"]
    assert len(decay) + len(no_decay) == len(list(model.parameters()))


@pytest.mark.parametrize("case", CASES)
def test_learning_rates_are_the_published_ones(case: str) -> None:
    expected = recipe(case)
    warmup = expected["warmup"]
    cfg = config(
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", expected["max_iters"]),
        *("SOLVER.WARMUP_ITERS", warmup["warmup_iters"]),
        *("SOLVER.WARMUP_FACTOR", warmup["warmup_ratio"]),
        *("SOLVER.POLY_LR_POWER", warmup["power"], "SOLVER.BASE_LR", expected["base_lr"]),
    )
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(1502):  # iteration by iteration through the warm-up, as in training
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    multiplier = WarmupPoly(
        max_iter=expected["max_iters"],
        warmup_iters=warmup["warmup_iters"],
        warmup_factor=warmup["warmup_ratio"],
    )
    for name, rate in expected["learning_rate_at_iteration"].items():
        iteration = int(name)
        computed = expected["base_lr"] * multiplier(iteration / expected["max_iters"])
        assert computed == pytest.approx(rate, rel=1e-9)
        if iteration < len(rates):
            assert rates[iteration] == pytest.approx(rate, rel=1e-9)


def test_schedule_ends_at_zero_and_survives_pickling() -> None:
    schedule = WarmupPoly(max_iter=7, warmup_iters=0, warmup_factor=0.5, power=0.9)
    assert schedule(0.0) == 1.0
    assert schedule(1.0) == 0.0
    assert schedule(8 / 7) == 0.0
    copy = pickle.loads(pickle.dumps(schedule))
    assert [copy(t / 7) for t in range(8)] == [schedule(t / 7) for t in range(8)]


def test_adamw_has_the_published_constants() -> None:
    cfg = config("SOLVER.BASE_LR", 1e-4, "SOLVER.WEIGHT_DECAY", 1e-4)
    optimizer = build_optimizer(cfg, Toy())
    expected = recipe("semask_t_ade20k")
    assert type(optimizer) is torch.optim.AdamW
    for group, decay in zip(optimizer.param_groups, (1e-4, 0.0), strict=True):
        assert list(group["betas"]) == expected["betas"]
        assert (group["lr"], group["eps"], group["weight_decay"]) == (1e-4, 1e-8, decay)


def test_sgd_and_gradient_clipping() -> None:
    cfg = config(
        *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0),
        *("SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.25),
    )
    model = nn.Linear(1, 1)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.SGD)
    before = model.bias.item()
    model.weight.grad, model.bias.grad = torch.zeros(1, 1), torch.tensor([100.0])
    optimizer.step()
    assert model.bias.item() == pytest.approx(before - 0.25)


def test_schedules_of_detectron2_are_still_there() -> None:
    cfg = config("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MAX_ITER", 10)
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    assert build_lr_scheduler(cfg, optimizer).get_last_lr()[0] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("SOLVER.OPTIMIZER", "ADAGRAD"), "SOLVER.OPTIMIZER is 'ADAGRAD'; set it to 'ADAMW'"),
        (("SOLVER.LR_SCHEDULER_NAME", "Polly"), "SOLVER.LR_SCHEDULER_NAME 'Polly'"),
        (
            ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_METHOD", "constant"),
            "SOLVER.WARMUP_METHOD must be 'linear'",
        ),
    ],
)
def test_unknown_names_are_config_errors(overrides: tuple[str, ...], message: str) -> None:
    cfg = config(*overrides)
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=message):
        build_lr_scheduler(cfg, build_optimizer(cfg, model))


def test_a_frozen_model_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(config(), nn.Linear(1, 1).requires_grad_(False))
