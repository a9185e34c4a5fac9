"""From a class and a mask for each query to semantic, instance and panoptic predictions.

arXiv 2107.06278, section 3.4, and arXiv 2112.01527, section 4. All functions take one image:
``logits`` (Q, K + 1), whose last column is "no object", and ``masks`` of mask logits.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from semask.modeling.layers.resize import resize
from semask.utils.precision import autocast_off


def crop_and_resize(maps: Tensor, image_size: Sequence[int], size: Sequence[int]) -> Tensor:
    """Remove the padding, then resize.

    Args:
        maps: (C, H, W) of the padded image.
        image_size: height and width of the image without padding.
        size: (H', W') of the result.

    Returns:
        (C, H', W').
    """
    height, width = image_size
    return resize(maps[None, :, :height, :width], size)[0]


def class_scores(logits: Tensor, masks: Tensor) -> Tensor:
    """A score of each class at each pixel, summed over the queries.

    The scores are neither logits nor probabilities: those of a pixel need not add up to 1, and may
    exceed it. A class has the highest score everywhere, also where no query sees an object.

    Args:
        logits: (..., Q, K + 1).
        masks: (..., Q, H, W) logits.

    Returns:
        (..., K, H, W): the sum over the queries of class probability times mask probability.
    """
    with autocast_off(masks.device):  # scores of neighbouring classes are often close
        return torch.einsum("...qc,...qhw->...chw", class_probabilities(logits), masks.sigmoid())


def class_probabilities(logits: Tensor) -> Tensor:
    """(..., Q, K + 1) to (..., Q, K): "no object" is dropped after the softmax."""
    return logits.softmax(dim=-1)[..., :-1]


@dataclass
class QueryInstances:
    """The instances that the queries of an image predict, not ordered; none is suppressed.

    Attributes:
        queries: (N,) int64; a query can appear under several classes.
        classes: (N,) int64.
        scores: (N,), class probability times the mean mask probability inside the mask.
        masks: (N, H, W) bool.
        boxes: (N, 4) float32, (x0, y0, x1, y1) around the pixels of the mask; 0 if it has none.
    """

    queries: Tensor
    classes: Tensor
    scores: Tensor
    masks: Tensor
    boxes: Tensor


def as_instances(
    size: tuple[int, int], classes: Tensor, scores: Tensor, masks: Any, boxes: Tensor
) -> Instances:
    """Detectron2's form of :class:`QueryInstances` of an image of this size."""
    return Instances(
        size, pred_classes=classes, scores=scores, pred_masks=masks, pred_boxes=Boxes(boxes)
    )


def select_instances(
    logits: Tensor, *, top: int = 100, things: Collection[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable pairs of a query and a class.

    Args:
        logits: (Q, K + 1).
        top: how many of the Q * K pairs are kept.
        things: the classes that are kept; None = all.

    Returns:
        Queries, classes and class probabilities, (N,) each with N <= ``top``.
    """
    probabilities = class_probabilities(logits)
    num_classes = probabilities.shape[1]
    best = probabilities.flatten().topk(min(top, probabilities.numel()), sorted=False)
    queries, classes = best.indices // num_classes, best.indices % num_classes
    if things is None:
        return queries, classes, best.values
    kept = torch.isin(classes, torch.tensor(sorted(things), device=classes.device).long())
    return queries[kept], classes[kept], best.values[kept]


def instance_prediction(
    logits: Tensor, masks: Tensor, *, top: int = 100, things: Collection[int] | None = None
) -> QueryInstances:
    """The most probable instances.

    Args:
        logits: (Q, K + 1).
        masks: (Q, H, W) logits at the size of the result.
        top, things: see :func:`select_instances`.
    """
    queries, classes, probabilities = select_instances(logits, top=top, things=things)
    chosen = masks[queries]
    inside = chosen > 0
    scores = probabilities * mask_quality(chosen, inside)
    return QueryInstances(queries, classes, scores, inside, mask_boxes(inside))


def mask_quality(masks: Tensor, inside: Tensor) -> Tensor:
    """(N, H, W) logits, and where they are above 0, to (N,): mean probability there, or 0."""
    total = (masks.sigmoid() * inside).flatten(1).sum(dim=1)
    return total / (inside.flatten(1).sum(dim=1) + 1e-6)


@dataclass
class QueryMasks:
    """The predictions of single queries, the strongest first.

    Attributes:
        queries: (N,) int64.
        classes: (N,) int64, the most probable one except "no object".
        scores: (N,), class probability times the mean mask probability inside the mask.
        masks: (N, h, w) probabilities.
        num_classes: K.
    """

    queries: Tensor
    classes: Tensor
    scores: Tensor
    masks: Tensor
    num_classes: int


def strongest_queries(logits: Tensor, masks: Tensor, *, top: int) -> QueryMasks:
    """The queries with the highest scores; those whose mask has no pixel are left out.

    Args:
        logits: (Q, K + 1).
        masks: (Q, h, w) logits.
        top: how many, at most.
    """
    probabilities, classes = class_probabilities(logits).max(dim=-1)
    num_classes = logits.shape[-1] - 1
    scores = probabilities * mask_quality(masks, masks > 0)
    best = scores.topk(min(top, len(scores)))
    queries = best.indices[best.values > 0]
    probable = masks[queries].sigmoid()
    return QueryMasks(queries, classes[queries], scores[queries], probable, num_classes)


def mask_boxes(masks: Tensor) -> Tensor:
    """(N, H, W) bool to (N, 4) float32: the smallest boxes (x0, y0, x1, y1); 0 if empty."""
    limits = []
    for occupied in (masks.any(dim=1), masks.any(dim=2)):  # columns, rows
        side = occupied.shape[1]
        place = torch.arange(side, device=masks.device)
        limits.append(torch.where(occupied, place, side).amin(dim=1))
        limits.append(torch.where(occupied, place + 1, 0).amax(dim=1))
    x0, x1, y0, y1 = limits
    boxes = torch.stack([x0, y0, x1, y1], dim=1)
    return boxes.where(x1[:, None] > 0, 0).float()


@dataclass(frozen=True)
class PanopticRule:
    """How overlapping masks become disjoint segments.

    Attributes:
        things: classes whose segments stay apart; those of any other class are merged.
        object_mask_threshold: probability of the class, above which a query counts.
        overlap_threshold: share of a mask's area that must remain visible.
        inside_only: pixels belong to a segment only where its mask's probability is at least 0.5,
            as in Mask2Former; otherwise each pixel belongs to the strongest one, as in MaskFormer.
    """

    things: Collection[int]
    object_mask_threshold: float = 0.8
    overlap_threshold: float = 0.8
    inside_only: bool = True


def panoptic_queries(logits: Tensor, rule: PanopticRule) -> tuple[Tensor, Tensor, Tensor]:
    """The queries above the threshold: indices, probabilities and classes, (n,) each."""
    probability, label = logits.softmax(dim=-1).max(dim=-1)
    seen = (label != logits.shape[-1] - 1) & (probability > rule.object_mask_threshold)
    queries = seen.nonzero()[:, 0]
    return queries, probability[queries], label[queries]


def panoptic_prediction(
    logits: Tensor, masks: Tensor, rule: PanopticRule
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Segments that do not overlap.

    Args:
        logits: (Q, K + 1).
        masks: (Q, H, W) logits at the size of the result.
        rule: see :class:`PanopticRule`.

    Returns:
        (H, W) int32 ids from 1, 0 = no segment; and for each id {"id", "isthing",
        "category_id"}, in their order.
    """
    queries, probability, labels = panoptic_queries(logits, rule)
    if len(queries) == 0:
        return masks.new_zeros(masks.shape[-2:], dtype=torch.int32), []
    mask_probability = masks[queries].sigmoid()
    strongest = (probability[:, None, None] * mask_probability).argmax(dim=0)
    number = torch.arange(len(queries), device=masks.device)[:, None, None]
    won = strongest == number
    inside = mask_probability >= 0.5
    areas = torch.stack([x.flatten(1).sum(dim=1) for x in (won, inside, won & inside)], dim=1)
    ids, segments = accept_segments(labels.tolist(), areas.tolist(), rule)
    result = torch.tensor(ids, dtype=torch.int32, device=masks.device)[strongest]
    if rule.inside_only:
        result = result * (won & inside).any(dim=0)
    return result, segments


def accept_segments(
    labels: Sequence[int], areas: Sequence[Sequence[int]], rule: PanopticRule
) -> tuple[list[int], list[dict[str, Any]]]:
    """Which queries become segments, and their ids.

    Args:
        labels: the classes of n queries.
        areas: for each query, the number of pixels where it is the strongest, inside its mask, and
            both.
        rule: how segments are made.

    Returns:
        The n ids, 0 for a query without a segment, and the segments of
        :func:`panoptic_prediction`.
    """
    ids: list[int] = []
    segments: list[dict[str, Any]] = []
    stuff: dict[int, int] = {}
    for label, (won, inside, both) in zip(labels, areas, strict=True):
        seen = won > 0 and inside > 0 and (both > 0 or not rule.inside_only)
        if not seen or won / inside < rule.overlap_threshold:
            ids.append(0)
            continue
        is_thing = label in rule.things
        if not is_thing and label in stuff:
            ids.append(stuff[label])
            continue
        segments.append({"id": len(segments) + 1, "isthing": is_thing, "category_id": label})
        ids.append(len(segments))
        if not is_thing:
            stuff[label] = len(segments)
    return ids, segments
