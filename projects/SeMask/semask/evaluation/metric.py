"""The interface of additional metrics of an evaluation, besides the confusion matrix.

``SemSegConfusionEvaluator`` reads each label map and computes each argmax once for all metrics.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from semask.ops.lazy_scores import LazyScores


@dataclass(frozen=True)
class EvaluatedImage:
    """One image of an evaluation, all tensors on the device of the model's output.

    Attributes:
        record: the dataset dict with its "file_name".
        scores: of all classes, in stripes or in full; recomputed at every use.
        prediction: (H, W) int64, the class with the highest score.
        label: (H, W) uint8, a class or ``ignore_label``.
        ignore_label: label value of ignored pixels.
        matrix: (K, K + 1) int64, the image's own confusion matrix.
        confidence: (H, W) float32, the probability of ``prediction``; None if no metric needs it.
    """

    record: Mapping[str, Any]
    scores: LazyScores
    prediction: Tensor
    label: Tensor
    ignore_label: int
    matrix: Tensor
    confidence: Tensor | None = None


@dataclass(frozen=True)
class MetricResult:
    """The results of a metric.

    Attributes:
        metrics: in percent, added to the "sem_seg" results; the names must be unique.
        document: plain types without NaN, added to the result file.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict)


class Metric(ABC):
    """Processes every image once; its memory must not grow with the number of pixels.

    Attributes:
        needs_confidence: whether it reads ``EvaluatedImage.confidence``.
    """

    needs_confidence = False

    @abstractmethod
    def reset(self) -> None:
        """Discard all results."""

    @abstractmethod
    def process(self, image: EvaluatedImage) -> None:
        """Add one image."""

    @abstractmethod
    def share(self) -> Any:
        """This process's share: an object that can be pickled, without GPU tensors."""

    @abstractmethod
    def evaluate(self, shares: Sequence[Any]) -> MetricResult:
        """The result over the shares of all processes, which must not depend on their order."""
