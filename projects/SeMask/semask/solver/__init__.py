"""Optimizer and learning-rate schedule of the published recipes."""

from semask.solver.lr_schedule import WarmupPoly, build_lr_scheduler
from semask.solver.optimizer import build_optimizer, parameter_groups

__all__ = ["WarmupPoly", "build_lr_scheduler", "build_optimizer", "parameter_groups"]
