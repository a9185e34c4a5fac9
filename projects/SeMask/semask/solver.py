"""Optimizer and learning-rate schedule of the published recipes.

AdamW (or SGD) with the published rules for weight decay, learning rates and clipping; polynomial
decay, multiplied by a linear warm-up.
"""

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import detectron2.solver
import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from semask.errors import ConfigError
from semask.ops.apply import select_fast_paths

__all__ = ["WarmupPoly", "build_lr_scheduler", "build_optimizer", "parameter_groups"]

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=torch.optim.Optimizer)

# Names for SOLVER.NO_DECAY, and the modules whose own parameters they select.
NO_DECAY_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "layer_norm": (nn.LayerNorm,),
    "group_norm": (nn.GroupNorm,),
    "batch_norm": (nn.modules.batchnorm._BatchNorm,),
    "embedding": (nn.Embedding,),
    "position": (),  # see POSITION_PARAMETERS
}
# Parameters that encode positions.
POSITION_PARAMETERS = ("relative_position_bias_table", "absolute_pos_embed")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: Sequence[str] = ("layer_norm", "position"),
    learning_rate: float | None = None,
    backbone_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters, split by weight decay and learning rate.

    With the default, LayerNorms and position parameters do not decay (Swin, arXiv 2103.14030).
    Everything else does, also biases, the BatchNorms of the heads and the semantic layers' gamma,
    as in the published SeMask-FPN recipes. The mask-classification recipes (arXiv 2112.01527,
    appendix A) add the other norms and embeddings, and train the backbone more slowly.

    Args:
        model: any module; frozen parameters are skipped, shared ones included once.
        weight_decay: of the parameters that decay.
        no_decay: kinds of parameters that do not, keys of ``NO_DECAY_MODULES``.
        learning_rate: of the parameters outside the backbone; None = the optimizer's for all.
        backbone_multiplier: factor on ``learning_rate`` for modules named "backbone".

    Returns:
        Parameter groups for a torch optimizer, without empty ones: with decay, then without, each
        in the model's order; if the backbone has another rate, its two groups come last.
    """
    exempt = tuple(kind for name in no_decay for kind in NO_DECAY_MODULES[name])
    split_backbone = learning_rate is not None and backbone_multiplier != 1
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (in_backbone, decays): [] for in_backbone in (False, True) for decays in (True, False)
    }
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        in_backbone = split_backbone and "backbone" in path.split(".")
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            position = "position" in no_decay and name in POSITION_PARAMETERS
            groups[in_backbone, not (position or isinstance(module, exempt))].append(parameter)
    result: list[dict[str, Any]] = []
    for (in_backbone, decays), parameters in groups.items():
        if parameters:
            group = {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
            if split_backbone and learning_rate is not None:
                group["lr"] = learning_rate * (backbone_multiplier if in_backbone else 1.0)
            result.append(group)
    return result


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """``SOLVER.OPTIMIZER`` over ``parameter_groups``, with gradient clipping if asked.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` "value" and "norm" are Detectron2's, per parameter;
    "full_model" scales all gradients by one factor to a joint L2 norm of at most ``CLIP_VALUE``.

    Raises:
        ConfigError: the optimizer's name, a kind of parameters or of clipping is unknown, or no
            parameter is trainable.
    """
    solver = cfg.SOLVER
    unknown = [name for name in solver.NO_DECAY if name not in NO_DECAY_MODULES]
    if unknown:
        raise ConfigError(f"SOLVER.NO_DECAY has '{unknown[0]}'; use {', '.join(NO_DECAY_MODULES)}.")
    groups = parameter_groups(
        model,
        solver.WEIGHT_DECAY,
        no_decay=solver.NO_DECAY,
        learning_rate=solver.BASE_LR,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
    )
    if not groups:
        raise ConfigError("The model has no trainable parameters: all are frozen (FREEZE_AT).")
    name = solver.OPTIMIZER
    optimizer: torch.optim.Optimizer
    if name == "ADAMW":
        adamw = _with_parameter_clipping(cfg, torch.optim.AdamW)
        betas = tuple(solver.BETAS)
        fused = "fused_optimizer" in select_fast_paths(cfg)
        optimizer = adamw(groups, lr=solver.BASE_LR, betas=betas, eps=solver.EPS, fused=fused)
    elif name == "SGD":
        sgd = _with_parameter_clipping(cfg, torch.optim.SGD)
        momentum, nesterov = solver.MOMENTUM, solver.NESTEROV
        optimizer = sgd(groups, lr=solver.BASE_LR, momentum=momentum, nesterov=nesterov)
    else:
        raise ConfigError(f"SOLVER.OPTIMIZER is '{name}'; set it to 'ADAMW' or 'SGD'.")
    if _clips_full_model(cfg):
        clip_full_model(optimizer, solver.CLIP_GRADIENTS.CLIP_VALUE)
    return optimizer


def clip_full_model(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale all gradients by one factor before each step, so that their norm is bounded.

    Args:
        optimizer: clips from now on; gradients must be unscaled before its step.
        max_norm: maximum L2 norm of the gradients of all parameters together.
    """

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(clip)


def _clips_full_model(cfg: CfgNode) -> bool:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return clip.ENABLED and clip.CLIP_TYPE == "full_model"


def _with_parameter_clipping(cfg: CfgNode, optimizer: type[T]) -> type[T]:
    if _clips_full_model(cfg):
        return optimizer
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in ("value", "norm"):
        raise ConfigError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is '{clip.CLIP_TYPE}'; set it to 'value', 'norm' "
            "or 'full_model'."
        )
    clipped: type[T] = maybe_add_gradient_clipping(cfg, optimizer)
    return clipped


class WarmupPoly(ParamScheduler):
    """Factor on the learning rate of iteration t (0-based) out of T.

        (1 - t / T) ** power * (1 - (1 - t / W) * (1 - warmup_factor))

    where the second factor is 1 from iteration W on. The warm-up multiplies the decaying rate,
    whereas Detectron2's warm-up ends at the rate of the decay at W.
    """

    def __init__(
        self, *, max_iter: int, warmup_iters: int, warmup_factor: float, power: float = 1.0
    ) -> None:
        """
        Args:
            max_iter: T, at least 1.
            warmup_iters: W; 0 for no warm-up.
            warmup_factor: factor of the warm-up at iteration 0, 0..1.
            power: exponent of the decay; 1 is linear.
        """
        self.max_iter = max_iter
        self.warmup_iters = warmup_iters
        self.warmup_factor = warmup_factor
        self.power = power

    def __call__(self, where: float) -> float:
        """
        Args:
            where: progress t / T, 0..1.

        Returns:
            The factor, 0..1.
        """
        iteration = round(where * self.max_iter)  # exact: the iteration as an integer
        factor = max(0.0, 1.0 - iteration / self.max_iter) ** self.power
        if iteration < self.warmup_iters:
            factor *= 1.0 - (1.0 - iteration / self.warmup_iters) * (1.0 - self.warmup_factor)
        return factor


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build ``WarmupPolyLR``, or Detectron2's schedule for any other ``SOLVER.LR_SCHEDULER_NAME``.

    Raises:
        ConfigError: Detectron2 does not know the name, or the warm-up is not linear.
    """
    name = cfg.SOLVER.LR_SCHEDULER_NAME
    if name != "WarmupPolyLR":
        try:
            return detectron2.solver.build_lr_scheduler(cfg, optimizer)
        except ValueError as error:
            raise ConfigError(
                f"SOLVER.LR_SCHEDULER_NAME '{name}': {error}. This project adds 'WarmupPolyLR'."
            ) from error
    if cfg.SOLVER.WARMUP_METHOD != "linear":
        raise ConfigError("SOLVER.WARMUP_METHOD must be 'linear' with 'WarmupPolyLR'.")
    if "POLY_LR_CONSTANT_ENDING" in cfg.SOLVER:
        logger.warning(
            "DeepLab's keys have been added to this config, and with them perhaps its own default "
            "of SOLVER.POLY_LR_POWER, which is %s here (this project's default: 1.0). Set the key "
            "in the config, or call semask.add_semask_config(cfg) after DeepLab's function.",
            cfg.SOLVER.POLY_LR_POWER,
        )
    multiplier = WarmupPoly(
        max_iter=cfg.SOLVER.MAX_ITER,
        warmup_iters=cfg.SOLVER.WARMUP_ITERS,
        warmup_factor=cfg.SOLVER.WARMUP_FACTOR,
        power=cfg.SOLVER.POLY_LR_POWER,
    )
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=cfg.SOLVER.MAX_ITER)
