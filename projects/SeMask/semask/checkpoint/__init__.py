"""Checkpoints: names of published ones, strict loading, atomic saving."""

from .checkpointer import SeMaskCheckpointer
from .convert import CheckpointKind, convert_state_dict, resize_bias_tables
from .errors import CheckpointError

__all__ = [
    "CheckpointError",
    "CheckpointKind",
    "SeMaskCheckpointer",
    "convert_state_dict",
    "resize_bias_tables",
]
