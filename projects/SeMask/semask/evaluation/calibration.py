"""Calibration: how far a model's confidence is from its accuracy (arXiv 1706.04599)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from semask.evaluation.metric import EvaluatedImage, Metric, MetricResult

# Bins of equal width between 0 and 1.
NUM_BINS = 20
# Confidences are rounded to a multiple of this and added up as integers, so that the sum does not
# depend on the order of the images or the number of processes.
_STEPS = 2**20


@dataclass(frozen=True)
class CalibrationCurve:
    """Pixels by confidence, in bins of equal width; bin b of B covers (b / B, (b + 1) / B].

    Attributes:
        pixels: (B,) number of pixels, without ignored ones.
        correct: (B,) how many of them were predicted correctly.
        confidence: (B,) sum of their confidences.
    """

    pixels: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """Share of correct pixels in each bin, NaN in empty ones."""
        return self._per_pixel(self.correct)

    @property
    def mean_confidence(self) -> np.ndarray:
        """Mean confidence in each bin, NaN in empty ones."""
        return self._per_pixel(self.confidence)

    @property
    def expected_calibration_error(self) -> float:
        """Mean |accuracy - confidence| of the bins, weighted by pixels; NaN without pixels."""
        total = self.pixels.sum()
        gap = np.abs(self.correct - self.confidence).sum()
        return float(gap / total) if total else float("nan")

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy over all pixels; NaN without pixels."""
        total = self.pixels.sum()
        gap = self.confidence.sum() - self.correct.sum()
        return float(gap / total) if total else float("nan")

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "CalibrationCurve":
        """Read the entry "calibration" of an evaluation's result file."""
        return cls(
            pixels=np.array(document["pixels"], np.float64),
            correct=np.array(document["correct"], np.float64),
            confidence=np.array(document["confidence"], np.float64),
        )

    def _per_pixel(self, values: np.ndarray) -> np.ndarray:
        empty = np.full(len(self.pixels), np.nan)
        return np.divide(values, self.pixels, out=empty, where=self.pixels > 0)


class Calibration(Metric):
    """The calibration curve over all labelled pixels of a dataset, in constant memory."""

    needs_confidence = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """See ``Metric``."""
        self._counts = torch.zeros((3, NUM_BINS), dtype=torch.int64)

    def process(self, image: EvaluatedImage) -> None:
        """Count the labelled pixels of one image."""
        assert image.confidence is not None  # requested by ``needs_confidence``
        valid = image.label != image.ignore_label
        correct = (image.prediction == image.label)[valid].long()
        steps = (image.confidence[valid] * _STEPS).round().long().clamp(1, _STEPS)
        bins = (steps * NUM_BINS - 1) // _STEPS
        self._counts = self._counts.to(bins.device)
        for row, values in enumerate((torch.ones_like(steps), correct, steps)):
            self._counts[row].scatter_add_(0, bins, values)

    def share(self) -> np.ndarray:
        """(3, bins) int64: pixels, correct ones, sum of confidences in steps of 1 / ``_STEPS``."""
        return self._counts.cpu().numpy()

    def evaluate(self, shares: Sequence[Any]) -> MetricResult:
        """The curve for the result file; no metrics."""
        pixels, correct, steps = np.stack(shares).sum(axis=0)
        curve = CalibrationCurve(pixels, correct, steps / _STEPS)
        error = curve.expected_calibration_error
        document = {
            "pixels": pixels.tolist(),
            "correct": correct.tolist(),
            "confidence": curve.confidence.tolist(),
            "expected_calibration_error": None if np.isnan(error) else error,
        }
        return MetricResult(document={"calibration": document})
