"""Measuring semantic segmentation, and looking at it."""

from .boundary import BoundaryIoU, boundary_band
from .build import build_evaluator, inference_folder, write_reports
from .calibration import Calibration, CalibrationCurve
from .confusion import (
    ClassCounts,
    confusion_matrix,
    mean_iou_of_labelled_classes,
    metrics_from_confusion,
)
from .drawing import Panel, compose_panels, render_panel
from .image_scores import ImageScores
from .palette import class_colors
from .panels import render_panels, save_picture, write_panels
from .parts import EvaluatedImage, EvaluationPart, PartResult
from .predicting import for_evaluators
from .prediction_files import PredictionFiles
from .report import report_parts, write_report
from .sem_seg_evaluator import SemSegConfusionEvaluator
from .table import class_table

__all__ = [
    "BoundaryIoU",
    "Calibration",
    "CalibrationCurve",
    "ClassCounts",
    "EvaluatedImage",
    "EvaluationPart",
    "ImageScores",
    "Panel",
    "PartResult",
    "PredictionFiles",
    "SemSegConfusionEvaluator",
    "boundary_band",
    "build_evaluator",
    "class_colors",
    "class_table",
    "compose_panels",
    "confusion_matrix",
    "for_evaluators",
    "inference_folder",
    "mean_iou_of_labelled_classes",
    "metrics_from_confusion",
    "render_panel",
    "render_panels",
    "report_parts",
    "save_picture",
    "write_panels",
    "write_report",
    "write_reports",
]
