"""What a model says about one image, and the pictures of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True, eq=False)
class Prediction:
    """The segmentation of one image of height H and width W into K classes.

    Attributes:
        image: (H, W, 3) uint8, RGB, upright.
        labels: (H, W) class of each pixel, 0..K-1; uint8, or uint16 where K > 256.
        class_names: K names.
        colors: (K, 3) uint8, RGB of each class.
        probabilities: (K, H, W) float32, or None where they were not asked for.
        prior: (H, W) classes that the decoded semantic prior names, as ``labels``; None where
            it was not asked for or the model has no prior head.
        priors: the semantic-prior logits of the stages, {"prior2": (K, h, w) float32, ...}; None
            where they were not asked for.
    """

    image: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    colors: np.ndarray
    probabilities: np.ndarray | None = None
    prior: np.ndarray | None = None
    priors: dict[str, np.ndarray] | None = None

    @property
    def colored(self) -> np.ndarray:
        """The labels in the colours of their classes, (H, W, 3) uint8, RGB."""
        return self.colors[self.labels]

    def overlay(self, alpha: float = 0.5) -> np.ndarray:
        """The image with the coloured labels laid over it.

        Args:
            alpha: opacity of the labels, 0 (the image alone) to 1 (the labels alone).

        Returns:
            (H, W, 3) uint8, RGB.

        Raises:
            ValueError: ``alpha`` is outside 0..1.
        """
        check_opacity(alpha)
        return cv2.addWeighted(self.colored, alpha, self.image, 1 - alpha, 0.0)

    def prior_pictures(self) -> dict[str, np.ndarray]:
        """For each stage, the classes that its semantic prior names, in their colours.

        Returns:
            {"prior2": (H, W, 3) uint8 RGB, ...}: enlarged in plain squares, one for each token;
            empty where the priors were not asked for.
        """
        return enlarged_priors(self.priors or {}, self.colors, self.labels.shape)


def check_opacity(alpha: float) -> None:
    """
    Raises:
        ValueError: ``alpha`` is outside 0..1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"the opacity has to lie in 0..1, not {alpha}")


def enlarged_priors(
    priors: Mapping[str, np.ndarray], colors: np.ndarray, size: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The class that each logit map names, in its colour and in plain squares.

    Args:
        priors: {name: (K, h, w)}.
        colors: (K, 3) uint8, RGB.
        size: (H, W).

    Returns:
        {name: (H, W, 3) uint8 RGB}.
    """
    height, width = size
    return {
        name: cv2.resize(colors[logits.argmax(0)], (width, height), interpolation=cv2.INTER_NEAREST)
        for name, logits in priors.items()
    }
