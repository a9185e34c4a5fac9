"""The tasks that the key ``TASK`` selects."""

from detectron2.config import CfgNode

from semask.config import register_resolver
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


@register_resolver
def _resolve_classes(cfg: CfgNode) -> None:
    build_task(cfg).resolve_classes()
