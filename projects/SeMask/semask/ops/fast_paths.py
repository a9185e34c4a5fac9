"""Which of the faster forms of a computation are used: the one place that decides.

Each gives what the plain form gives, up to rounding. ``MODEL.FAST_PATHS`` overrides the choice.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from detectron2.config import CfgNode

from semask.errors import ConfigError
from semask.ops.malloc import can_keep_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FastPath:
    """One faster form.

    Attributes:
        does: what it does, for the log.
        suits: whether "auto" takes it for a model on this device, with mixed precision or not.
    """

    does: str
    suits: Callable[[torch.device, bool], bool]


FAST_PATHS = {
    "striped_loss": FastPath(
        "up-sampling and cross entropy a stripe of rows at a time", lambda device, mixed: True
    ),
    "fused_optimizer": FastPath(
        "AdamW's update in one kernel", lambda device, mixed: device.type in ("cpu", "cuda")
    ),
    "winograd": FastPath(
        "3x3 convolutions by Winograd's products",
        lambda device, mixed: device.type == "cpu" and not mixed,
    ),
    "folded": FastPath(
        "evaluation with products of the semantic layers' matrices",
        lambda device, mixed: device.type in ("cpu", "cuda") and not mixed,
    ),
    "chunked": FastPath(
        "evaluation a few windows or rows at a time",
        lambda device, mixed: device.type == "cpu",
    ),
    "recomputed": FastPath(
        "training keeps the input of each Swin block alone and makes the rest again",
        lambda device, mixed: device.type == "cpu",
    ),
    "sdpa": FastPath(
        "window attention by scaled_dot_product_attention",
        lambda device, mixed: device.type == "cuda",
    ),
    "kept_memory": FastPath(
        "the process keeps the memory that it frees, for the next step",
        lambda device, mixed: device.type == "cpu" and can_keep_memory(),
    ),
}


def fast_paths(cfg: CfgNode) -> frozenset[str]:
    """The names of the forms that a model of this config uses; they are logged once.

    Args:
        cfg: ``MODEL.FAST_PATHS``, "auto", "none" or names with commas between them,
            ``MODEL.DEVICE``, and ``SOLVER.AMP.ENABLED``.

    Raises:
        ConfigError: there is no form of that name.
    """
    return _chosen(cfg.MODEL.FAST_PATHS, torch.device(cfg.MODEL.DEVICE), cfg.SOLVER.AMP.ENABLED)


@cache  # so that each choice is logged once
def _chosen(setting: str, device: torch.device, mixed_precision: bool) -> frozenset[str]:
    if setting == "auto":
        chosen = [name for name, path in FAST_PATHS.items() if path.suits(device, mixed_precision)]
    else:
        chosen = [name.strip() for name in setting.split(",") if setting != "none"]
    unknown = [name for name in chosen if name not in FAST_PATHS]
    if unknown:
        raise ConfigError(
            f"MODEL.FAST_PATHS is '{setting}', and there is no '{unknown[0]}'; use 'auto', 'none' "
            f"or any of {', '.join(FAST_PATHS)}, with commas between them."
        )
    listed = "; ".join(f"{name} ({FAST_PATHS[name].does})" for name in chosen) or "none"
    logger.info("Fast paths on %s (MODEL.FAST_PATHS '%s'): %s", device.type, setting, listed)
    return frozenset(chosen)
