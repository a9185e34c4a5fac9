"""Warnings about the start of a run: random weights, and values that differ from its config."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import nn
from torch.optim import AdamW, Optimizer

from semask.modeling.backbone.contract import HierarchicalEncoder

logger = logging.getLogger(__name__)

# Values of a parameter group, and their keys.
_KEYS = {
    "weight_decay": "SOLVER.WEIGHT_DECAY",
    "betas": "SOLVER.BETAS",
    "eps": "SOLVER.EPS",
    "momentum": "SOLVER.MOMENTUM",
    "nesterov": "SOLVER.NESTEROV",
}


def warn_of_random_weights(model: nn.Module) -> None:
    """Warn that the encoder has no pre-trained weights, although its recipe expects them.

    Args:
        model: as built, with no checkpoint loaded.
    """
    encoders = [module for module in model.modules() if isinstance(module, HierarchicalEncoder)]
    if any(encoder.pretrained for encoder in encoders):
        return
    advice = encoders[0].weights_advice if encoders else HierarchicalEncoder.weights_advice
    logger.warning(
        "The training starts from random weights, but this config's recipe starts from "
        "pre-trained ones: %s.",
        advice,
    )


def without_pretrained(cfg: CfgNode) -> CfgNode:
    """The config of a model that gets its weights from a checkpoint: none of timm's are fetched."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.freeze()
    return cfg


def warn_of_restored(state: Mapping[str, Any], optimizer: Optimizer, seed: int) -> None:
    """Warn about values that a resumed run loads from its checkpoint instead of its config.

    Args:
        state: what ``TrainStep.state_dict`` gave.
        optimizer: as the config makes it, before it takes the state over.
        seed: the config's ``SEED``.

    Raises:
        ValueError: the optimizer cannot resume from the state.
    """
    check_optimizer_state(state["optimizer"], optimizer)
    restored = find_restored(state["optimizer"], optimizer)
    saved = state["data"]["seed"]
    if seed >= 0 and saved != seed:
        restored["SEED"] = (saved, seed)
    if restored:
        listed = (f"{key} {old} (config: {new})" for key, (old, new) in restored.items())
        logger.warning(
            "These values are the checkpoint's and not the config's: %s. To train with the "
            "config's, set MODEL.WEIGHTS to the checkpoint in a run without --resume and with "
            "another OUTPUT_DIR.",
            ", ".join(listed),
        )


def check_optimizer_state(state: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Refuse the state of another optimizer; torch would only notice in the next step, or never.

    Args:
        state: what an optimizer's ``state_dict`` gave.
        optimizer: the one that is to continue.

    Raises:
        ValueError: names the difference and the keys behind it.
    """
    groups, own = state["param_groups"], optimizer.param_groups
    kinds = ["ADAMW" if adaptive else "SGD" for adaptive in _are_adaptive(groups, optimizer)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"SOLVER.OPTIMIZER was {kinds[0]} and is now {kinds[1]}")
    sizes = [[len(group["params"]) for group in side] for side in (groups, own)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"its groups have {sizes[0]} parameters and the config's {sizes[1]}: see "
            "MODEL.SWIN.FREEZE_AT, SOLVER.NO_DECAY and SOLVER.BACKBONE_MULTIPLIER"
        )
    numbers = [number for group in groups for number in group["params"]]
    parameters = [parameter for group in own for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in state["state"].get(number, {}).items():
            shape = tuple(getattr(value, "shape", ()))
            if shape and shape != tuple(parameter.shape):
                raise ValueError(
                    f"'{name}' of parameter {number} has the shape {shape} where the parameter "
                    f"has {tuple(parameter.shape)}: see SOLVER.NO_DECAY and MODEL.SWIN.FREEZE_AT"
                )


def _are_adaptive(groups: list[dict[str, Any]], optimizer: Optimizer) -> tuple[bool, bool]:
    return any("betas" in group for group in groups), isinstance(optimizer, AdamW)


def find_restored(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, tuple[Any, Any]]:
    """The settings of ``state`` that differ from an optimizer's own.

    Args:
        state: has passed ``check_optimizer_state``.
        optimizer: as the config makes it, before it takes the state over.

    Returns:
        The value in the state and that of the config, by key.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for number, (saved, own) in enumerate(
        zip(state["param_groups"], optimizer.param_groups, strict=True)
    ):
        rate = "SOLVER.BACKBONE_MULTIPLIER" if number and "SOLVER.BASE_LR" not in found else ""
        keys = {"initial_lr": rate or "SOLVER.BASE_LR", **_KEYS}
        for name, key in keys.items():
            if name in saved and name in own and _plain(saved[name]) != _plain(own[name]):
                found.setdefault(key, (_plain(saved[name]), _plain(own[name])))
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
