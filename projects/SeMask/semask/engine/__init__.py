"""Training and evaluation runs: what is checked before them, the trainer, its hooks."""

from semask.engine.hooks import PanelsHook
from semask.engine.launch.checks import check_run
from semask.engine.launch.distributed import (
    LOST_PEER,
    ignore_storage_warning,
    is_lost_peer,
    joined,
    once_per_machine,
    wrap_ddp,
)
from semask.engine.launch.ending import Preempted, exit_statuses, passed_on
from semask.engine.launch.run_setup import resumes, run_lock, set_up_run
from semask.engine.runs import evaluate, train
from semask.engine.train_step import NonFiniteLossError
from semask.engine.trainer import Trainer
from semask.engine.weights import WeightAverage
from semask.utils.device import Torchrun, resolve_device

__all__ = [
    "LOST_PEER",
    "NonFiniteLossError",
    "PanelsHook",
    "Preempted",
    "Torchrun",
    "Trainer",
    "WeightAverage",
    "check_run",
    "evaluate",
    "exit_statuses",
    "ignore_storage_warning",
    "is_lost_peer",
    "joined",
    "once_per_machine",
    "passed_on",
    "resolve_device",
    "resumes",
    "run_lock",
    "set_up_run",
    "train",
    "wrap_ddp",
]
