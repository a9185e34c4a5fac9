"""Learning-rate schedule: polynomial decay, multiplied by a linear warm-up."""

import logging

import detectron2.solver
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from semask.errors import ConfigError

logger = logging.getLogger(__name__)


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
