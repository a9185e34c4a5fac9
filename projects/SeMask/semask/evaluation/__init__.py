"""Metrics."""

from semask.evaluation.boundary import BoundaryIoU, boundary_band
from semask.evaluation.calibration import Calibration, CalibrationCurve
from semask.evaluation.confusion import (
    ClassCounts,
    ImageScores,
    class_table,
    confusion_matrix,
    mean_iou_of_labelled_classes,
    metrics_from_confusion,
)
from semask.evaluation.metric import EvaluatedImage, Metric, MetricResult
from semask.evaluation.prediction_files import PredictionFiles
from semask.evaluation.sem_seg_evaluator import SemSegConfusionEvaluator

__all__ = [
    "BoundaryIoU",
    "Calibration",
    "CalibrationCurve",
    "ClassCounts",
    "EvaluatedImage",
    "ImageScores",
    "Metric",
    "MetricResult",
    "PredictionFiles",
    "SemSegConfusionEvaluator",
    "boundary_band",
    "class_table",
    "confusion_matrix",
    "mean_iou_of_labelled_classes",
    "metrics_from_confusion",
]
