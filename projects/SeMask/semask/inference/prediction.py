"""The prediction for one image, and its pictures."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from semask.data.segments import panoptic_picture
from semask.inference.masks import Masks, json_rles, stacked
from semask.inference.regions import Regions, class_regions, prior_regions
from semask.utils.files import replacing
from semask.visualize.drawing import draw_legend, save_picture
from semask.visualize.instances import (
    DrawnSegment,
    detection_texts,
    draw_instances,
    draw_segments,
    instance_colors,
    segment_colors,
)


class ImagePrediction(ABC):
    """The interface that ``semask predict`` uses; every task's predictor returns one.

    Attributes:
        image: (H, W, 3) uint8, RGB, upright.
    """

    image: np.ndarray

    @property
    def has_scores(self) -> bool:
        """Whether :meth:`pictures` depends on ``min_score``."""
        return False

    @abstractmethod
    def pictures(self, *, alpha: float = 0.5, min_score: float = 0.5) -> dict[str, np.ndarray]:
        """The drawn pictures: "overlay", and the priors if they were requested.

        Args:
            alpha: opacity of the overlay, 0 to 1.
            min_score: instances with a lower score are left out.

        Returns:
            {name: (H, W, 3) uint8, RGB}.
        """

    def regions(self, *, min_score: float = 0.5) -> dict[str, Regions]:
        """The region of each pixel of the pictures; by default none.

        Args:
            min_score: as for :meth:`pictures`.

        Returns:
            {name of a picture: its regions}.
        """
        return {}

    @abstractmethod
    def save(self, folder: str, name: str) -> None:
        """Write the prediction as data, such as a label map; existing files are replaced.

        Args:
            folder: the output folder; each kind of file goes into its own folder in it.
            name: of the image, without suffix; may include folders.
        """

    @abstractmethod
    def save_classes(self, folder: str) -> None:
        """Write ``classes.json``, and ``legend.png`` if the classes have colours."""


@dataclass(frozen=True, eq=False)
class Prediction(ImagePrediction):
    """The segmentation of one image of height H and width W into K classes.

    Attributes:
        image: (H, W, 3) uint8, RGB, upright.
        labels: (H, W) class of each pixel, 0..K-1; uint8, or uint16 where K > 256.
        class_names: K names.
        colors: (K, 3) uint8, RGB of each class.
        probabilities: (K, H, W) float32; None if not requested.
        confidence: (H, W) float32, the probability of each pixel's class; None if not requested.
        prior: (H, W) classes of the decoded semantic prior, as ``labels``; None if not requested
            or the model has no prior head.
        priors: the semantic-prior logits of the stages, {"prior2": (K, h, w) float32, ...}; None
            where they were not asked for.
    """

    image: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    colors: np.ndarray
    probabilities: np.ndarray | None = None
    confidence: np.ndarray | None = None
    prior: np.ndarray | None = None
    priors: dict[str, np.ndarray] | None = None

    @property
    def colored(self) -> np.ndarray:
        """The labels in the colours of their classes, (H, W, 3) uint8, RGB."""
        return self.colors[self.labels]

    def overlay(self, alpha: float = 0.5) -> np.ndarray:
        """The image with the coloured labels blended over it.

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

    def pictures(self, *, alpha: float = 0.5, min_score: float = 0.5) -> dict[str, np.ndarray]:
        """See :class:`ImagePrediction`; ``min_score`` has no effect."""
        return {"overlay": self.overlay(alpha), **self.prior_pictures()}

    def regions(self, *, min_score: float = 0.5) -> dict[str, Regions]:
        """See :class:`ImagePrediction`."""
        names, colors = self.class_names, self.colors
        shown = class_regions(self.labels, names, colors, self.confidence)
        return {"overlay": shown, **prior_regions(self.priors or {}, names, colors)}

    def save(self, folder: str, name: str) -> None:
        """Write ``labels/NAME.png``."""
        save_picture(self.labels, os.path.join(folder, "labels", f"{name}.png"))

    def save_classes(self, folder: str) -> None:
        """See :class:`ImagePrediction`."""
        _save_json(
            {"classes": _with_colors(self.class_names, self.colors)},
            os.path.join(folder, "classes.json"),
        )
        save_picture(draw_legend(self.class_names, self.colors), os.path.join(folder, "legend.png"))


def check_opacity(alpha: float) -> None:
    """
    Raises:
        ValueError: ``alpha`` is outside 0..1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, not {alpha}")


def enlarged_priors(
    priors: Mapping[str, np.ndarray], colors: np.ndarray, size: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The class of highest logit at each token, as a coloured square.

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


@dataclass(frozen=True, eq=False)
class InstancePrediction(ImagePrediction):
    """N instances in an image of height H and width W, highest score first.

    Attributes:
        image: (H, W, 3) uint8, RGB, upright.
        boxes: (N, 4) float32: x0, y0, x1, y1 in pixels.
        scores: (N,) float32, 0..1.
        classes: (N,) int64, indices into ``class_names``.
        each_mask: N masks (H, W) bool, in one array or decoded when they are read; None for a
            detector of boxes alone.
        class_names: of the categories.
        category_ids: their ids in the dataset's own annotation file.
        panoptic: (H, W) int32, the segment of each pixel, 0 = none; None unless the model is
            panoptic.
        segments: Detectron2's entries for each segment: "id", "isthing", "category_id" and others.
        stuff_names: of the classes of a panoptic model's semantic map.
        stuff_colors: their colours, (K, 3) uint8 RGB; None as for ``panoptic``.
        prior: (H, W) class of each pixel by the decoded semantic prior, an index into
            ``prior_names``; None if not requested, or the model's prior is not supervised.
        priors: the semantic-prior logits of the stages, {"prior2": (K, h, w) float32, ...}; None
            where they were not asked for.
        prior_names: names of the K classes of the priors.
        prior_colors: (K, 3) uint8, their colours, RGB.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    each_mask: Masks | None
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    panoptic: np.ndarray | None = None
    segments: tuple[dict[str, Any], ...] = ()
    stuff_names: tuple[str, ...] = ()
    stuff_colors: np.ndarray | None = None
    prior: np.ndarray | None = None
    priors: dict[str, np.ndarray] | None = None
    prior_names: tuple[str, ...] = ()
    prior_colors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool, decoded at each access (``each_mask`` for loops); None without masks."""
        if self.each_mask is None:
            return None
        return stacked(self.each_mask, self.image.shape[:2])

    @property
    def has_scores(self) -> bool:
        """See :class:`ImagePrediction`; a panoptic map is drawn whole."""
        return self.panoptic is None

    def overlay(self, alpha: float = 0.5, min_score: float = 0.5) -> np.ndarray:
        """The image with masks, boxes, scores and, if there are several categories, their names.

        For a panoptic model, the image with its segments: stuff in the colour of its class, each
        thing in a colour of its own.

        Args:
            alpha: opacity of masks and segments, 0 to 1.
            min_score: instances with a lower score are left out.

        Returns:
            (H, W, 3) uint8, RGB.

        Raises:
            ValueError: ``alpha`` is outside 0..1.
        """
        check_opacity(alpha)
        if self.panoptic is not None:
            drawn = {segment["id"]: self._drawn(segment) for segment in self.segments}
            return draw_segments(self.image, self.panoptic, drawn, alpha=alpha)
        shown = slice(self._number(min_score))
        return draw_instances(
            self.image,
            self.boxes[shown],
            None if self.each_mask is None else self.each_mask[shown],
            texts=detection_texts(self.classes[shown], self.scores[shown], self.class_names),
            alpha=alpha,
        )

    def _number(self, min_score: float) -> int:
        """How many instances have at least this score; they are the first ones."""
        return int((self.scores >= min_score).sum())

    def _drawn(self, segment: Mapping[str, Any]) -> DrawnSegment:
        index = segment["category_id"]
        if segment["isthing"]:
            score = f" {segment['score']:.2f}" if "score" in segment else ""
            return DrawnSegment(f"{self.class_names[index]}{score}")
        color = None if self.stuff_colors is None else self.stuff_colors[index].tolist()
        return DrawnSegment(self.stuff_names[index], color)

    def prior_pictures(self) -> dict[str, np.ndarray]:
        """For each stage, the classes that its semantic prior names, in their colours.

        Returns:
            {"prior2": (H, W, 3) uint8 RGB, ...}: enlarged in plain squares, one for each token;
            empty where the priors were not asked for.
        """
        if self.prior_colors is None:
            return {}
        return enlarged_priors(self.priors or {}, self.prior_colors, self.image.shape[:2])

    def coco_results(self, image_id: int | str) -> list[dict[str, Any]]:
        """All instances in COCO's result format, in plain types, for JSON.

        Args:
            image_id: of the image, for the results.

        Returns:
            For each instance "image_id", "category_id" (the dataset's own), "bbox" (x, y, width,
            height), "score", and if there are masks "segmentation" (compressed RLE).
        """
        results: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "category_id": self.category_ids[index],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for (x0, y0, x1, y1), score, index in zip(
                self.boxes.tolist(), self.scores.tolist(), self.classes.tolist(), strict=True
            )
        ]
        if self.each_mask is not None:
            for result, encoded in zip(results, json_rles(self.each_mask), strict=True):
                result["segmentation"] = encoded
        return results

    def pictures(self, *, alpha: float = 0.5, min_score: float = 0.5) -> dict[str, np.ndarray]:
        """See :class:`ImagePrediction`."""
        return {"overlay": self.overlay(alpha, min_score), **self.prior_pictures()}

    def regions(self, *, min_score: float = 0.5) -> dict[str, Regions]:
        """See :class:`ImagePrediction`."""
        if self.panoptic is None:
            shown = self._instance_regions(min_score)
        else:
            shown = self._segment_regions(self.panoptic)
        if self.prior_colors is None:
            return {"overlay": shown}
        priors = prior_regions(self.priors or {}, self.prior_names, self.prior_colors)
        return {"overlay": shown, **priors}

    def _instance_regions(self, min_score: float) -> Regions:
        """The instance of highest score at each pixel; without masks, the smallest box."""
        shown = self._number(min_score)
        index = np.full(self.image.shape[:2], -1, np.int32)
        if self.each_mask is not None:
            for number in reversed(range(shown)):
                index[self.each_mask[number]] = number
        else:
            corners = np.round(self.boxes[:shown]).astype(int).clip(min=0)
            sides = corners[:, 2:] - corners[:, :2]
            for number in np.argsort(-sides.prod(axis=1), kind="stable").tolist():
                x0, y0, x1, y1 = corners[number]
                index[y0:y1, x0:x1] = number
        names = tuple(self.class_names[category] for category in self.classes[:shown])
        return Regions(index, names, instance_colors(shown), self.scores[:shown])

    def _segment_regions(self, panoptic: np.ndarray) -> Regions:
        drawn = {segment["id"]: self._drawn(segment) for segment in self.segments}
        index = np.full(panoptic.shape, -1, np.int32)
        for number, identity in enumerate(drawn):
            index[panoptic == identity] = number
        things, stuff = self.class_names, self.stuff_names
        names = [
            (things if segment["isthing"] else stuff)[segment["category_id"]]
            for segment in self.segments
        ]
        scores = [segment.get("score", np.nan) for segment in self.segments]
        known = None if np.isnan(scores).all() else np.array(scores, np.float32)
        return Regions(index, tuple(names), segment_colors(drawn), known)

    def save(self, folder: str, name: str) -> None:
        """Write ``instances/NAME.json``, and for segments ``panoptic/NAME.png`` and ``.json``."""
        _save_json(self.coco_results(name), os.path.join(folder, "instances", f"{name}.json"))
        if self.panoptic is not None:
            path = os.path.join(folder, "panoptic", name)
            save_picture(panoptic_picture(self.panoptic), f"{path}.png")
            _save_json(list(self.segments), f"{path}.json")

    def save_classes(self, folder: str) -> None:
        """See :class:`ImagePrediction`; "stuff" and the legend are those of the semantic map."""
        ids = zip(self.class_names, self.category_ids, strict=True)
        classes = [{"index": n, "name": name, "id": given} for n, (name, given) in enumerate(ids)]
        description = {"classes": classes}
        if self.stuff_colors is not None:
            description["stuff"] = _with_colors(self.stuff_names, self.stuff_colors)
            legend = draw_legend(self.stuff_names, self.stuff_colors)
            save_picture(legend, os.path.join(folder, "legend.png"))
        _save_json(description, os.path.join(folder, "classes.json"))


def _with_colors(names: Sequence[str], colors: np.ndarray) -> list[dict[str, Any]]:
    pairs = zip(names, colors.tolist(), strict=True)
    return [{"index": index, "name": n, "color": color} for index, (n, color) in enumerate(pairs)]


def _save_json(content: Any, path: str) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content).encode())
