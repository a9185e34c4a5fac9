"""Mask2Former's matching and losses, without gradients of masks that have no target."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semask.modeling.losses.mask_losses import (
    Mask2FormerCriterion,
    cross_entropy_loss,
    dice_loss,
)
from semask.modeling.losses.matcher import Mask2FormerMatcher, Match, dice_cost
from semask.modeling.losses.point_sampling import random_points, sample_points
from semask.modeling.mask_decoder.base import MaskPrediction
from semask.ops.mask_decoder import FactoredPrediction

# Bytes of targets that are converted to floating-point numbers at a time.
TARGET_BYTES = 8 * 2**20


class FactoredCriterion(Mask2FormerCriterion):
    """Only the masks of matched queries have gradients."""

    def matched_masks(self, prediction: MaskPrediction, matches: Sequence[Match]) -> Tensor:
        """See :class:`Mask2FormerCriterion`."""
        if not (
            isinstance(prediction, FactoredPrediction)
            # Not in mixed precision, where the factors are rounded.
            and prediction.embeddings.dtype == prediction.masks.dtype
            and prediction.shared.features.dtype == prediction.masks.dtype
        ):
            return super().matched_masks(prediction, matches)
        queries = [match.queries for match in matches]
        return prediction.shared.matched(prediction.embeddings, prediction.masks, queries)

    def mask_losses(self, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Mask2FormerCriterion`."""
        points = uncertain_points(
            masks.detach(),
            self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_sample_ratio=self.importance_sample_ratio,
        )
        logits = sample_points(masks[:, None], points)[:, 0]
        goal = targets_at(targets, points)
        return cross_entropy_loss(logits, goal), dice_loss(logits, goal)


class OneSoftplusMatcher(Mask2FormerMatcher):
    """Cross entropy from one softplus, as softplus(x) - softplus(-x) = x."""

    def mask_costs(self, masks: Tensor, target_masks: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Mask2FormerMatcher`."""
        points = random_points(1, self.num_points, masks)
        logits = sample_points(masks[None], points)[0]
        targets = targets_at(target_masks, points)
        cost = F.softplus(logits).sum(dim=1, keepdim=True) - logits @ targets.T
        return cost / logits.shape[1], dice_cost(logits, targets)


def targets_at(masks: Tensor, points: Tensor) -> Tensor:
    """:func:`sample_points` of targets, a few of them at a time.

    Args:
        masks: (N, H, W) bool.
        points: (N, P, 2), or (1, P, 2) for all masks, of the type of the result.

    Returns:
        (N, P).
    """
    number, *size = masks.shape
    each = points.dtype.itemsize * masks.shape[1:].numel()
    step = min(number, max(1, TARGET_BYTES // max(1, each)))
    # Two tensors for all parts: repeated allocation fragments the heap.
    values = points.new_empty(number, points.shape[1])
    buffer = points.new_empty(step, 1, *size)
    for start in range(0, number, max(1, step)):
        part = slice(start, min(start + step, number))
        maps = buffer[: part.stop - start].copy_(masks[part, None])
        if len(points) == 1:
            values[part] = sample_points(maps.transpose(0, 1), points)[0]
        else:
            values[part] = sample_points(maps, points[part])[:, 0]
    return values


def uncertain_points(
    logits: Tensor,
    num_points: int,
    *,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
) -> Tensor:
    """See :func:`semask.modeling.losses.point_sampling.uncertain_points`; in another order.

    On the CPU by NumPy's partition, which takes a tenth of the time of ``topk``.
    """
    with torch.no_grad():
        count, num_uncertain = len(logits), int(importance_sample_ratio * num_points)
        candidates = random_points(count, int(oversample_ratio * num_points), logits)
        certainty = sample_points(logits[:, None], candidates)[:, 0].abs()
        others = random_points(count, num_points - num_uncertain, logits)
        if num_uncertain == 0:
            return others
        if num_uncertain == certainty.shape[1]:
            return torch.cat([candidates, others], dim=1)
        if logits.device.type == "cpu":
            order = np.argpartition(certainty.numpy(), num_uncertain, axis=1)
            chosen = torch.from_numpy(order[:, :num_uncertain])
        else:
            chosen = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        return torch.cat([uncertain, others], dim=1)
