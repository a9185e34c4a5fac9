"""Checkpoints: names of published ones, strict loading, atomic saving."""

from .checkpointer import SeMaskCheckpointer
from .convert import CheckpointKind, convert_state_dict, resize_bias_tables
from .errors import (
    CheckpointError,
    DamagedCheckpointError,
    MissingCheckpointError,
    UnwritableCheckpointError,
)
from .reading import read_checkpoint
from .writing import write_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointKind",
    "DamagedCheckpointError",
    "MissingCheckpointError",
    "SeMaskCheckpointer",
    "UnwritableCheckpointError",
    "convert_state_dict",
    "read_checkpoint",
    "resize_bias_tables",
    "write_checkpoint",
]
