"""Optimizer and learning-rate schedule of the published recipes."""

from .lr_schedule import WarmupPoly, build_lr_scheduler
from .optimizer import build_optimizer, parameter_groups

__all__ = ["WarmupPoly", "build_lr_scheduler", "build_optimizer", "parameter_groups"]
