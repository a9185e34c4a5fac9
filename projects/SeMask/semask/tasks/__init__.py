"""The tasks that the key ``TASK`` selects."""

from semask.tasks.base import (
    TASK_REGISTRY,
    Task,
    build_task,
    evaluated_weights,
    inference_folder,
    write_reports,
)
from semask.tasks.instance import InstanceTask
from semask.tasks.panoptic import PanopticTask
from semask.tasks.semantic import SemanticTask

__all__ = [
    "TASK_REGISTRY",
    "InstanceTask",
    "PanopticTask",
    "SemanticTask",
    "Task",
    "build_task",
    "evaluated_weights",
    "inference_folder",
    "write_reports",
]
