"""Training and evaluation runs: what is checked before them, the trainer, its hooks."""

from .checks import check_run, resolve_device
from .hooks import PanelsHook, draw_panels, panels_path
from .trainer import Trainer, wrap_ddp

__all__ = [
    "PanelsHook",
    "Trainer",
    "check_run",
    "draw_panels",
    "panels_path",
    "resolve_device",
    "wrap_ddp",
]
