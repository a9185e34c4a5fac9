"""Training and evaluation runs: what is checked before them, the trainer, its hooks."""

from .checks import check_run, resolve_device
from .distributed import (
    LOST_PEER,
    Torchrun,
    ignore_storage_warning,
    is_lost_peer,
    joined,
    once_per_machine,
)
from .ema import WeightAverage
from .evaluate import evaluate
from .exit_status import exit_statuses
from .hooks import PanelsHook, draw_panels, panels_path
from .nonfinite import NonFiniteLossError
from .preemption import Preempted, passed_on
from .resume import resumes
from .run_lock import run_lock
from .run_setup import set_up_run
from .trainer import Trainer, wrap_ddp

__all__ = [
    "LOST_PEER",
    "NonFiniteLossError",
    "PanelsHook",
    "Preempted",
    "Torchrun",
    "Trainer",
    "WeightAverage",
    "check_run",
    "draw_panels",
    "evaluate",
    "exit_statuses",
    "ignore_storage_warning",
    "is_lost_peer",
    "joined",
    "once_per_machine",
    "panels_path",
    "passed_on",
    "resolve_device",
    "resumes",
    "run_lock",
    "set_up_run",
    "wrap_ddp",
]
