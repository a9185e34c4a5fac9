"""Correct, false and missed segments of each image (arXiv 1801.00868, section 4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from semask.evaluation.panoptic_truth import Segment


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


def image_scores(matching: SegmentMatching) -> dict[str, Any]:
    """An image's "segments", "right", "missed" and "false" counts, and "PQ" in percent."""
    return {
        "segments": len(matching.right) + len(matching.missed),
        "right": len(matching.right),
        "missed": len(matching.missed),
        "false": len(matching.false),
        "PQ": matching.quality,
    }
