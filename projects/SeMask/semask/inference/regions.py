"""The region of a prediction that each pixel belongs to, for legends and tooltips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Regions:
    """The N regions of a picture: classes, instances or segments.

    Attributes:
        index: (h, w) int32, the region of each pixel, 0..N-1; -1 = none. A semantic prior has
            fewer pixels than the image.
        names: N.
        colors: (N, 3) uint8, RGB, as drawn.
        scores: (N,) float32, 0..1, NaN for regions without one; None = no region has one.
        confidence: (h, w) float32, the probability of each pixel's region; None = not known.
    """

    index: np.ndarray
    names: tuple[str, ...]
    colors: np.ndarray
    scores: np.ndarray | None = None
    confidence: np.ndarray | None = None

    def shares(self) -> np.ndarray:
        """(N,) float64: each region's share of all pixels, 0..1."""
        return self._sums(None) / self.index.size

    def certainties(self) -> np.ndarray:
        """(N,) float64: the score of each region, or the mean confidence of its pixels; or NaN."""
        if self.scores is not None:
            return self.scores.astype(np.float64)
        if self.confidence is None:
            return np.full(len(self.names), np.nan)
        pixels = self._sums(None)
        means = self._sums(self.confidence) / np.maximum(pixels, 1)
        return np.where(pixels > 0, means, np.nan)

    def _sums(self, weights: np.ndarray | None) -> np.ndarray:
        shifted = (self.index + 1).ravel()
        values = None if weights is None else weights.ravel()
        return np.bincount(shifted, values, minlength=len(self.names) + 1)[1:]


def class_regions(
    classes: np.ndarray,
    names: Sequence[str],
    colors: np.ndarray,
    confidence: np.ndarray | None = None,
) -> Regions:
    """The regions of a class map.

    Args:
        classes: (h, w) integers, 0..K-1.
        names: K.
        colors: (K, 3) uint8, RGB.
        confidence: (h, w) float32, or None.
    """
    return Regions(classes.astype(np.int32), tuple(names), colors, confidence=confidence)


def prior_regions(
    priors: Mapping[str, np.ndarray], names: Sequence[str], colors: np.ndarray
) -> dict[str, Regions]:
    """The regions of each stage's semantic prior, with the probability of its predicted class.

    Args:
        priors: {"prior2": (K, h, w) logits, ...}.
        names: K.
        colors: (K, 3) uint8, RGB.
    """
    regions = {}
    for name, logits in priors.items():
        highest = logits.max(axis=0)
        confidence = 1 / np.exp(logits - highest).sum(axis=0)
        regions[name] = class_regions(logits.argmax(axis=0), names, colors, confidence)
    return regions
