"""Measuring semantic segmentation, and looking at it."""

from .confusion import (
    ClassCounts,
    confusion_matrix,
    mean_iou_of_labelled_classes,
    metrics_from_confusion,
)
from .drawing import Panel, compose_panels, render_panel
from .palette import class_colors
from .panels import render_panels, save_picture, write_panels
from .sem_seg_evaluator import SemSegConfusionEvaluator
from .table import class_table

__all__ = [
    "ClassCounts",
    "Panel",
    "SemSegConfusionEvaluator",
    "class_colors",
    "class_table",
    "compose_panels",
    "confusion_matrix",
    "mean_iou_of_labelled_classes",
    "metrics_from_confusion",
    "render_panel",
    "render_panels",
    "save_picture",
    "write_panels",
]
