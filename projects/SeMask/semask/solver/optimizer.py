"""AdamW (or SGD) with Swin's rule on weight decay."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from semask.errors import ConfigError
from semask.ops.fast_paths import fast_paths

# Parameters that are a position's own value: shrinking them has no meaning.
POSITION_PARAMETERS = ("relative_position_bias_table", "absolute_pos_embed")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters, split by weight decay (Swin, arXiv 2103.14030).

    LayerNorms and position parameters do not decay. Everything else does, also biases, the
    BatchNorms of the heads and the semantic layers' gamma, as in the published SeMask recipes.

    Args:
        model: any module; frozen parameters are left out, shared ones come once.
        weight_decay: the decay of those that do.

    Returns:
        At most two groups for a torch optimizer, without empty ones: those with decay, then
        those without, each in the order of the model.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            exempt = isinstance(module, nn.LayerNorm) or name in POSITION_PARAMETERS
            (no_decay if exempt else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """``SOLVER.OPTIMIZER`` over ``parameter_groups``, with Detectron2's gradient clipping if asked.

    Raises:
        ConfigError: the optimizer's name is not known, or nothing is left to train.
    """
    groups = parameter_groups(model, cfg.SOLVER.WEIGHT_DECAY)
    if not groups:
        raise ConfigError("The model has no trainable parameter: everything is frozen.")
    name = cfg.SOLVER.OPTIMIZER
    if name == "ADAMW":
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        betas = tuple(cfg.SOLVER.BETAS)
        fused = "fused_optimizer" in fast_paths(cfg)
        return adamw(groups, lr=cfg.SOLVER.BASE_LR, betas=betas, eps=cfg.SOLVER.EPS, fused=fused)
    if name == "SGD":
        sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
        momentum, nesterov = cfg.SOLVER.MOMENTUM, cfg.SOLVER.NESTEROV
        return sgd(groups, lr=cfg.SOLVER.BASE_LR, momentum=momentum, nesterov=nesterov)
    raise ConfigError(f"SOLVER.OPTIMIZER is '{name}'; it can be 'ADAMW' or 'SGD'.")
