"""Confusion matrices of semantic segmentation, and the metrics and table derived from them.

A confusion matrix here has K rows and K + 1 columns of int64 counts: ``matrix[p, g]`` is the
number of pixels of ground-truth class ``g`` that were predicted as class ``p``, and the last column
counts the ignored pixels. Sums over images and processes are exact, in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from semask.evaluation.metric import EvaluatedImage, Metric, MetricResult
from semask.utils.text import table

ABSENT = "absent"


def confusion_matrix(
    prediction: torch.Tensor, label: torch.Tensor, num_classes: int, ignore_label: int
) -> torch.Tensor:
    """Count the pixels of each (predicted class, true class) pair.

    Args:
        prediction: integer tensor of any shape, classes 0..K-1.
        label: integer tensor of the same shape and device, classes 0..K-1 or ``ignore_label``.
        num_classes: K.
        ignore_label: value of ignored pixels in ``label``.

    Returns:
        (K, K + 1) int64 tensor on the device of ``prediction``; rows are predictions, columns
        ground truth, the last column ignored pixels.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape"
        )
    columns = num_classes + 1
    truth = label.reshape(-1).long()
    truth = torch.where(truth == ignore_label, num_classes, truth)
    cells = prediction.reshape(-1).long() * columns + truth
    return torch.bincount(cells, minlength=num_classes * columns).view(num_classes, columns)


@dataclass(frozen=True)
class ClassCounts:
    """Pixels of each class, without ignored pixels; every array is (K,) float64.

    Attributes:
        correct: predicted as the class and of the class (true positives).
        labelled: of the class in the ground truth.
        predicted: predicted as the class.
    """

    correct: np.ndarray
    labelled: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray) -> "ClassCounts":
        """Sum up a (K, K + 1) confusion matrix."""
        valid = matrix[:, :-1].astype(np.float64)
        return cls(
            correct=valid.diagonal(), labelled=valid.sum(axis=0), predicted=valid.sum(axis=1)
        )

    @property
    def union(self) -> np.ndarray:
        """Pixels that are of the class in the ground truth, the prediction or both."""
        return self.labelled + self.predicted - self.correct

    @property
    def iou(self) -> np.ndarray:
        """correct / union: 0 for classes that were only predicted, NaN where both are absent."""
        return _ratio(self.correct, self.union)

    @property
    def accuracy(self) -> np.ndarray:
        """correct / labelled; NaN for classes without ground truth."""
        return _ratio(self.correct, self.labelled)


def metrics_from_confusion(matrix: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """The metrics of Detectron2's ``SemSegEvaluator``, under the same names, in percent.

    With c, t, p and u the correct, labelled, predicted and union pixels of a class (see
    ``ClassCounts``; ignored pixels are excluded):

    - ``IoU-<class>`` = c / u and ``ACC-<class>`` = c / t, both NaN without ground truth (t = 0);
    - ``mIoU``: mean of c / u over the classes with u > 0;
    - ``fwIoU``: mean of c / u weighted with t;
    - ``mACC``: mean of c / t over the classes with t > 0;
    - ``pACC`` = sum of c / sum of t.

    On a set in which some class has no ground truth, two definitions of mIoU are in use. They
    differ if such a class is predicted somewhere: its IoU is 0, and ``mIoU`` (as in Detectron2
    v0.6, and in the evaluation behind the numbers of arXiv 2112.12782) counts that 0; the mean
    over the classes with ground truth (as in Detectron2's main branch) leaves it out and is never
    lower. The second is ``mean_iou_of_labelled_classes``.

    Args:
        matrix: (K, K + 1) confusion matrix.
        class_names: the K names.

    Returns:
        "mIoU", "fwIoU", "IoU-<class>"..., "mACC", "pACC", "ACC-<class>"...; NaN where undefined
        (for the means, if no class is present).

    Raises:
        ValueError: matrix and class names do not fit together.
    """
    check_matrix(matrix, class_names)
    counts = ClassCounts.of(matrix)
    labelled = counts.labelled > 0
    iou = 100 * np.where(labelled, counts.iou, np.nan)
    accuracy = 100 * counts.accuracy
    total = counts.labelled.sum()

    metrics = {
        "mIoU": 100 * _mean(counts.iou[counts.union > 0]),
        "fwIoU": _ratio_of((iou * counts.labelled)[labelled].sum(), total),
    }
    metrics |= {f"IoU-{name}": float(value) for name, value in zip(class_names, iou, strict=True)}
    metrics["mACC"] = _mean(accuracy[labelled])
    metrics["pACC"] = 100 * _ratio_of(counts.correct.sum(), total)
    metrics |= {
        f"ACC-{name}": float(value) for name, value in zip(class_names, accuracy, strict=True)
    }
    return metrics


def mean_iou_of_labelled_classes(matrix: np.ndarray) -> float:
    """The other mIoU: the mean over classes with ground truth, in percent (NaN if there is none).

    It equals ``mIoU`` of ``metrics_from_confusion`` unless a class without ground truth has been
    predicted.

    Args:
        matrix: (K, K + 1) confusion matrix.
    """
    counts = ClassCounts.of(matrix)
    return 100 * _mean(counts.iou[counts.labelled > 0])


def class_table(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """One line per class (pixels, IoU, accuracy), then the means and notes on excluded classes.

    "absent" marks undefined values: the accuracy of a class without ground truth, and the IoU of
    a class that is neither in the ground truth nor predicted. A class that is only predicted has
    an IoU of 0. The mean of the IoU column is mIoU.

    Args:
        matrix: (K, K + 1) confusion matrix.
        class_names: the K names, in the order of the lines.

    Returns:
        Several lines of text, without a final line break.

    Raises:
        ValueError: matrix and class names do not fit together.
    """
    check_matrix(matrix, class_names)
    counts = ClassCounts.of(matrix)
    rows = [
        (name, f"{int(pixels):,}", _percent(iou), _percent(accuracy))
        for name, pixels, iou, accuracy in zip(
            class_names, counts.labelled, 100 * counts.iou, 100 * counts.accuracy, strict=True
        )
    ]
    shown = table(rows, ["class", "pixels", "IoU", "accuracy"])
    return "\n".join([shown, "", *_footer(matrix, class_names, counts)])


def check_matrix(matrix: np.ndarray, class_names: Sequence[str]) -> None:
    """Check that a matrix is (K, K + 1) for K class names.

    Raises:
        ValueError: it is not.
    """
    expected = (len(class_names), len(class_names) + 1)
    if matrix.shape != expected:
        raise ValueError(
            f"A confusion matrix of {len(class_names)} classes is {expected[0]}x{expected[1]} "
            f"(predictions x ground truth and ignored); got {matrix.shape}."
        )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _ratio_of(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _footer(matrix: np.ndarray, class_names: Sequence[str], counts: ClassCounts) -> list[str]:
    metrics = metrics_from_confusion(matrix, class_names)
    means = ", ".join(
        f"{key} {_percent(metrics[key])}" for key in ("mIoU", "fwIoU", "mACC", "pACC")
    )
    lines = [f"{means} (percent)"]
    ignored = int(matrix[:, -1].sum())
    if ignored:
        lines.append(f"{ignored:,} of {int(matrix.sum()):,} pixels are ignored.")
    absent = int((counts.union == 0).sum())
    if absent:
        lines.append(
            f"{absent} of {len(class_names)} classes are absent from ground truth and prediction "
            "and excluded from the means."
        )
    only_predicted = int(((counts.labelled == 0) & (counts.predicted > 0)).sum())
    if only_predicted:
        other = _percent(mean_iou_of_labelled_classes(matrix))
        lines.append(
            f"{only_predicted} of {len(class_names)} classes are predicted but absent from the "
            f"ground truth: their IoU of 0 counts in mIoU. The mean over the classes in the ground "
            f"truth alone is {other}."
        )
    return lines


def _percent(value: float) -> str:
    return ABSENT if np.isnan(value) else f"{value:.2f}"


class ImageScores(Metric):
    """Pixel accuracy and mean IoU of every image; keeps no pixels.

    The mean is over the classes in the image's ground truth, so a few pixels of another class have
    little effect. An image without any labelled pixel has no scores (null).
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """See ``Metric``."""
        self._images: list[dict[str, Any]] = []

    def process(self, image: EvaluatedImage) -> None:
        """Score one image."""
        counts = ClassCounts.of(image.matrix.cpu().numpy())
        labelled = counts.labelled > 0
        scored = bool(labelled.any())
        self._images.append(
            {
                "file_name": str(image.record.get("file_name", "")),
                "mIoU": 100 * float(counts.iou[labelled].mean()) if scored else None,
                "pACC": 100 * float(counts.correct.sum() / counts.labelled.sum())
                if scored
                else None,
            }
        )

    def share(self) -> list[dict[str, Any]]:
        """A dict per image: "file_name", and "mIoU" and "pACC" in percent."""
        return self._images

    def evaluate(self, shares: Sequence[Any]) -> MetricResult:
        """The images by name, for the result file; no metrics."""
        images = sorted(
            (image for share in shares for image in share), key=lambda image: image["file_name"]
        )
        return MetricResult(document={"images": images})


def ranked(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The images with scores, lowest mIoU first; ties by pixel accuracy, then by name."""
    scored = [image for image in images if image["mIoU"] is not None]
    return sorted(scored, key=lambda image: (image["mIoU"], image["pACC"], image["file_name"]))
