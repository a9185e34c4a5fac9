"""Boundary IoU (arXiv 2103.16562): IoU of the pixels near the contours of the classes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semask.evaluation.confusion import ClassCounts
from semask.evaluation.metric import EvaluatedImage, Metric, MetricResult

# Width of the bands, as a share of the image's diagonal: the paper's choice.
DILATION_RATIO = 0.02
# Values that are not classes: ignored pixels, and pixels outside the image.
_NO_CLASS = -1
_OUTSIDE = -2


def boundary_band(classes: Tensor, distance: int) -> Tensor:
    """Pixels within some distance of the contour of their region.

    With a distance of 1, these are the pixels with a neighbour of another value among their eight.
    The border of the image is a contour, as in the paper.

    Args:
        classes: (H, W) integers of at least -1, signed.
        distance: in pixels, at least 1; the larger of the distances along rows and columns.

    Returns:
        (H, W) bool.
    """
    padded = F.pad(classes, (distance,) * 4, value=_OUTSIDE)
    beside = padded[:, 1:] != padded[:, :-1]
    below = (padded[1:] != padded[:-1])[:, distance:-distance]
    # The square around a pixel has a single value if and only if each of its rows and its middle
    # column are constant, so one test covers all classes.
    in_rows = _any_of(_any_of(beside, 2 * distance, dim=1), 2 * distance + 1, dim=0)
    return in_rows | _any_of(below, 2 * distance, dim=0)


def _any_of(flags: Tensor, number: int, dim: int) -> Tensor:
    """Whether any of ``number`` neighbours is true; ``dim`` shrinks by ``number`` - 1."""
    covered = 1
    while covered < number:
        step = min(covered, number - covered)
        length = flags.shape[dim] - step
        flags = flags.narrow(dim, 0, length) | flags.narrow(dim, step, length)
        covered += step
    return flags


def band_width(height: int, width: int, ratio: float = DILATION_RATIO) -> int:
    """The band's width in pixels for an image of this size, at least 1."""
    return max(1, round(ratio * math.hypot(height, width)))


class BoundaryIoU(Metric):
    """Boundary IoU of each class over the whole dataset, and the mean.

    For a class, it is the intersection over union of the ground truth's pixels near its contour and
    the prediction's pixels near its contour, in pixels over all images.

    Ignored pixels belong to no class. They are also masked in the prediction before its contours
    are computed, so that both have the same contours around them.
    """

    def __init__(self, class_names: Sequence[str], ratio: float = DILATION_RATIO) -> None:
        """
        Args:
            class_names: of the K classes.
            ratio: width of the bands, as a share of each image's diagonal.
        """
        self._class_names = list(class_names)
        self._ratio = ratio
        self.reset()

    def reset(self) -> None:
        """See ``Metric``."""
        self._counts = torch.zeros((3, len(self._class_names)), dtype=torch.int64)

    def process(self, image: EvaluatedImage) -> None:
        """Count the boundary pixels of one image."""
        ignored = image.label == image.ignore_label
        truth = image.label.long().masked_fill(ignored, _NO_CLASS)
        prediction = image.prediction.masked_fill(ignored, _NO_CLASS)
        distance = band_width(truth.shape[0], truth.shape[1], self._ratio)
        near_truth = boundary_band(truth, distance) & ~ignored
        near_prediction = boundary_band(prediction, distance) & ~ignored
        both = near_truth & near_prediction & (truth == prediction)
        self._counts = self._counts.to(truth.device)
        self._counts += torch.stack(
            [
                torch.bincount(classes[band], minlength=len(self._class_names))
                for classes, band in (
                    (truth, both),
                    (truth, near_truth),
                    (prediction, near_prediction),
                )
            ]
        )

    def share(self) -> np.ndarray:
        """(3, K) int64: pixels of the intersection, near the truth, near the prediction."""
        return self._counts.cpu().numpy()

    def evaluate(self, shares: Sequence[Any]) -> MetricResult:
        """``mBoundaryIoU`` and ``BoundaryIoU-<class>``, in percent.

        As for IoU, a class without ground truth has NaN, and the mean is over the classes that
        are in the ground truth or predicted.
        """
        total = np.stack(shares).sum(axis=0)
        counts = ClassCounts(*total.astype(np.float64))
        iou = 100 * counts.iou
        present = iou[counts.union > 0]
        metrics = {"mBoundaryIoU": float(present.mean()) if present.size else float("nan")}
        for name, value, labelled in zip(self._class_names, iou, counts.labelled > 0, strict=True):
            metrics[f"BoundaryIoU-{name}"] = float(value) if labelled else float("nan")
        document = {
            "dilation_ratio": self._ratio,
            "pixels": dict(
                zip(("intersection", "labelled", "predicted"), total.tolist(), strict=True)
            ),
        }
        return MetricResult(metrics=metrics, document={"boundary_iou": document})
