"""Mask2Former's matching and losses, without gradients of masks that have no target."""

from collections.abc import Iterator, Sequence

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
        goals = [
            sample_points(targets[part, None].to(masks.dtype), points[part])[:, 0]
            for part in _parts(targets, masks.dtype)
        ]
        goal = torch.cat(goals) if goals else torch.zeros_like(logits)
        return cross_entropy_loss(logits, goal), dice_loss(logits, goal)


class OneSoftplusMatcher(Mask2FormerMatcher):
    """Cross entropy from one softplus, as softplus(x) - softplus(-x) = x."""

    def mask_costs(self, masks: Tensor, target_masks: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Mask2FormerMatcher`."""
        points = random_points(1, self.num_points, masks)
        logits = sample_points(masks[None], points)[0]
        parts = [
            sample_points(target_masks[None, part].to(masks.dtype), points)[0]
            for part in _parts(target_masks, masks.dtype)
        ]
        targets = torch.cat(parts) if parts else logits.new_zeros(0, logits.shape[1])
        cost = F.softplus(logits).sum(dim=1, keepdim=True) - logits @ targets.T
        return cost / logits.shape[1], dice_cost(logits, targets)


def _parts(masks: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """A few of the masks (N, H, W) at a time."""
    step = max(1, TARGET_BYTES // max(1, masks.shape[1:].numel() * dtype.itemsize))
    for start in range(0, len(masks), step):
        yield slice(start, start + step)


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
