"""Scores of each image of a dataset."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from semask.evaluation.confusion import ClassCounts
from semask.evaluation.metric import EvaluatedImage, Metric, MetricResult


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


def spread(images: Sequence[dict[str, Any]], num_bins: int = 20) -> np.ndarray:
    """Number of images in each of ``num_bins`` equal ranges of mIoU from 0 to 100 percent."""
    values = [image["mIoU"] for image in ranked(images)]
    return np.histogram(values, bins=num_bins, range=(0, 100))[0]
