"""Correct, false and missed instances and segments of each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from semask.evaluation.panoptic_truth import Segment

# A prediction is correct from this IoU on, as for AP50.
IOU = 0.5
# Predictions with a lower score are not counted.
SCORE = 0.5

FALSE, IN_CROWD = -1, -2


@dataclass(frozen=True)
class Matching:
    """The matching of an image's predicted and annotated instances.

    Attributes:
        found: for each prediction, in order, the index of its instance, or ``FALSE``, or
            ``IN_CROWD`` if it lies in a crowd and is ignored.
        missed: indices of the instances without a correct prediction.
    """

    found: tuple[int, ...]
    missed: tuple[int, ...]

    @property
    def f1(self) -> float | None:
        """F1 in percent: 2 R / (2 R + F + M) for R correct predictions, F false predictions and M
        missed instances; None if all are 0.
        """
        right = sum(index >= 0 for index in self.found)
        counted = 2 * right + self.found.count(FALSE) + len(self.missed)
        return 200 * right / counted if counted else None


def match_instances(
    predicted: Sequence[Any],
    predicted_classes: Sequence[int],
    truth: Sequence[Any],
    truth_classes: Sequence[int],
    crowds: Sequence[bool],
) -> Matching:
    """Match each prediction with the unmatched instance of highest IoU.

    Args:
        predicted: RLEs, or boxes (x, y, width, height), highest score first.
        predicted_classes: their categories.
        truth: the instances, in the same form.
        truth_classes: their categories.
        crowds: which of them are crowds.
    """
    usable = {index for index, crowd in enumerate(crowds) if not crowd}
    if not len(predicted) or not len(truth):
        return Matching((FALSE,) * len(predicted), tuple(sorted(usable)))
    overlaps = mask_util.iou(list(predicted), list(truth), [int(crowd) for crowd in crowds])
    same = np.equal.outer(np.asarray(predicted_classes), np.asarray(truth_classes))
    overlaps = np.where(same, overlaps, 0.0)
    free, found = set(usable), []
    for row in overlaps:
        best = max(free, key=lambda index: row[index], default=None)
        if best is not None and row[best] >= IOU:
            free.remove(best)
            found.append(best)
        else:
            in_crowd = any(row[index] >= IOU for index in range(len(row)) if crowds[index])
            found.append(IN_CROWD if in_crowd else FALSE)
    return Matching(tuple(found), tuple(sorted(free)))


def instance_scores(
    truth: COCO, detections: Mapping[Any, list[dict[str, Any]]], *, masks: bool
) -> list[dict[str, Any]]:
    """Counts and F1 of the instances of each image.

    Args:
        truth: the annotations, as evaluated.
        detections: in COCO's result format, by image id.
        masks: compare masks instead of boxes.

    Returns:
        A dict per image: "image_id", "file_name", "instances", "right", "false", "missed" (at an
        IoU and a score of 0.5) and "F1" in percent, None if there is no instance and no prediction.
    """
    scores = []
    for image_id, image in truth.imgs.items():
        annotations = truth.imgToAnns.get(image_id, [])
        crowds = [bool(annotation["iscrowd"]) for annotation in annotations]
        matching = match_instances(
            *_boxes_or_masks(detections.get(image_id, []), masks),
            [truth.annToRLE(entry) if masks else entry["bbox"] for entry in annotations],
            [annotation["category_id"] for annotation in annotations],
            crowds,
        )
        right = sum(index >= 0 for index in matching.found)
        scores.append(
            {
                "image_id": image_id,
                "file_name": image["file_name"],
                "instances": len(crowds) - sum(crowds),
                "right": right,
                "false": matching.found.count(FALSE),
                "missed": len(matching.missed),
                "F1": matching.f1,
            }
        )
    return scores


def _boxes_or_masks(
    results: Sequence[Mapping[str, Any]], masks: bool
) -> tuple[list[Any], list[int]]:
    """Regions and categories of results in COCO's format, highest score first.

    Args:
        results: of one image; those below ``SCORE`` are excluded.
        masks: the regions are the masks, else the boxes.
    """
    chosen = [result for result in results if result["score"] >= SCORE]
    chosen.sort(key=lambda result: -result["score"])
    key = "segmentation" if masks else "bbox"
    return [result[key] for result in chosen], [result["category_id"] for result in chosen]


@dataclass(frozen=True)
class SegmentMatching:
    """The matching of an image's predicted and annotated segments.

    Attributes:
        right: pairs of a segment of the ground truth and a predicted one, with their IoU, which is
            above 0.5.
        missed: ids of the other segments of the ground truth, except crowds.
        false: ids of the other predicted segments, except those mostly in crowds or in unlabelled
            pixels.
    """

    right: Mapping[tuple[int, int], float]
    missed: tuple[int, ...]
    false: tuple[int, ...]

    @property
    def quality(self) -> float | None:
        """Panoptic quality of the image over all segments, in percent; None without segments."""
        counted = len(self.right) + (len(self.missed) + len(self.false)) / 2
        return 100 * sum(self.right.values()) / counted if counted else None


def match_segments(
    truth_ids: np.ndarray,
    truth: Mapping[int, Segment],
    found_ids: np.ndarray,
    found: Mapping[int, Segment],
) -> SegmentMatching:
    """Match two panoptic maps; with an IoU above 0.5 the match is unique.

    Args:
        truth_ids: (H, W) segment ids of the ground truth, 0 = unlabelled.
        truth: its segments.
        found_ids: (H, W) predicted ids, 0 = no segment.
        found: the predicted segments.
    """
    shared = _overlaps(truth_ids, found_ids)
    truth_areas = dict(zip(*np.unique(truth_ids, return_counts=True), strict=True))
    found_areas = dict(zip(*np.unique(found_ids, return_counts=True), strict=True))
    right: dict[tuple[int, int], float] = {}
    for (g, p), both in shared.items():
        if g not in truth or p not in found or truth[g].crowd:
            continue
        union = truth_areas[g] + found_areas[p] - both - shared.get((0, p), 0)
        if truth[g].category == found[p].category and both / union > 0.5:
            right[g, p] = both / union
    seen = {g for g, _ in right}
    used = {p for _, p in right}
    missed = [g for g, each in truth.items() if g in truth_areas and not each.crowd]
    return SegmentMatching(
        right=right,
        missed=tuple(g for g in missed if g not in seen),
        false=tuple(
            p
            for p, each in found.items()
            if p in found_areas
            and p not in used
            and _ignored(p, each.category, truth, shared) <= found_areas[p] / 2
        ),
    )


def _overlaps(first: np.ndarray, second: np.ndarray) -> dict[tuple[int, int], int]:
    """Number of pixels of each pair of overlapping ids."""
    shift = int(second.max(initial=0)) + 1
    pairs, counts = np.unique(first.astype(np.int64) * shift + second, return_counts=True)
    return {
        divmod(pair, shift): count
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)
    }


def _ignored(
    found: int,
    category: int,
    truth: Mapping[int, Segment],
    shared: Mapping[tuple[int, int], int],
) -> int:
    """Pixels of a predicted segment that are unlabelled or in a crowd of its category."""
    crowds = [g for g, each in truth.items() if each.crowd and each.category == category]
    return sum(shared.get((g, found), 0) for g in (0, *crowds))


def segment_scores(matching: SegmentMatching) -> dict[str, Any]:
    """An image's "segments", "right", "missed" and "false" counts, and "PQ" in percent."""
    return {
        "segments": len(matching.right) + len(matching.missed),
        "right": len(matching.right),
        "missed": len(matching.missed),
        "false": len(matching.false),
        "PQ": matching.quality,
    }
