"""Checkpoints: conversion of published ones, strict loading, atomic saving."""

from semask.checkpoint.checkpointer import SeMaskCheckpointer
from semask.checkpoint.convert import CheckpointKind, convert_state_dict, resize_bias_tables
from semask.checkpoint.folder import has_checkpoint, write_checkpoint, written_checkpoints
from semask.checkpoint.mismatch import starts_partially
from semask.checkpoint.reading import read_checkpoint
from semask.errors import (
    CheckpointError,
    DamagedCheckpointError,
    MissingCheckpointError,
    UnwritableCheckpointError,
)

__all__ = [
    "CheckpointError",
    "CheckpointKind",
    "DamagedCheckpointError",
    "MissingCheckpointError",
    "SeMaskCheckpointer",
    "UnwritableCheckpointError",
    "convert_state_dict",
    "has_checkpoint",
    "read_checkpoint",
    "resize_bias_tables",
    "starts_partially",
    "write_checkpoint",
    "written_checkpoints",
]
