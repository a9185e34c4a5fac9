"""Bipartite matching of predicted with annotated masks (arXiv 2107.06278, section 3.2)."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semask.modeling.losses.point_sampling import random_points, sample_points
from semask.modeling.mask_decoder.base import MaskPrediction

logger = logging.getLogger(__name__)

# SciPy refuses NaN and infinite costs.
LARGEST_COST = 1e10


@dataclass
class MaskTarget:
    """The annotated masks of an image.

    Attributes:
        labels: (N,) int64 classes, 0..K-1.
        masks: (N, H, W) bool at the size of the padded image; padding and ignored pixels are
            False.
    """

    labels: Tensor
    masks: Tensor


@dataclass
class Match:
    """Pairs of a query and a target of an image.

    Attributes:
        queries, targets: (n,) int64 indices; n = min(Q, N).
        finite: whether all costs were finite; if not, the pairs are arbitrary.
    """

    queries: Tensor
    targets: Tensor
    finite: bool


class MaskMatcher(nn.Module):
    """The pairs with the lowest total cost: class, mask and dice, each with a weight."""

    def __init__(self, *, class_weight: float, mask_weight: float, dice_weight: float) -> None:
        """
        Args:
            class_weight, mask_weight, dice_weight: of the three costs.
        """
        super().__init__()
        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self._warned = False

    @torch.no_grad()
    def forward(self, prediction: MaskPrediction, targets: Sequence[MaskTarget]) -> list[Match]:
        """Match the queries of each image.

        Costs that are not finite are clamped, and the match is marked. With more targets than
        queries, some targets have no query.

        Args:
            prediction: of B images, in float32 or better.
            targets: of the B images.
        """
        matches = []
        for logits, masks, target in zip(*prediction, targets, strict=True):
            mask_cost, dice_cost = self.mask_costs(masks, target.masks)
            cost = (
                self.class_weight * class_cost(logits, target.labels)
                + self.mask_weight * mask_cost
                + self.dice_weight * dice_cost
            )
            matches.append(self._assign(cost))
        return matches

    @abstractmethod
    def mask_costs(self, masks: Tensor, target_masks: Tensor) -> tuple[Tensor, Tensor]:
        """Costs of mask and dice for all pairs of an image.

        Args:
            masks: (Q, h, w) logits.
            target_masks: (N, H, W) bool.

        Returns:
            (Q, N) twice.
        """

    def _assign(self, cost: Tensor) -> Match:
        num_queries, num_targets = cost.shape
        if num_targets > num_queries and not self._warned:
            self._warned = True
            logger.warning(
                "An image has %d masks, more than the %d queries "
                "(MODEL.MASK_FORMER.NUM_OBJECT_QUERIES): the others are not trained. This is "
                "logged once.",
                num_targets,
                num_queries,
            )
        device, cost = cost.device, cost.cpu()
        finite = bool(cost.isfinite().all())
        cost = cost.nan_to_num(nan=0.0).clamp(-LARGEST_COST, LARGEST_COST)
        from scipy.optimize import linear_sum_assignment  # only training needs SciPy

        queries, targets = linear_sum_assignment(cost.numpy())
        return Match(
            torch.as_tensor(queries, dtype=torch.int64, device=device),
            torch.as_tensor(targets, dtype=torch.int64, device=device),
            finite,
        )


class MaskFormerMatcher(MaskMatcher):
    """Focal and dice cost at all pixels of the predicted masks."""

    def __init__(
        self, *, class_weight: float = 1.0, mask_weight: float = 20.0, dice_weight: float = 1.0
    ) -> None:
        """
        Args:
            class_weight, mask_weight, dice_weight: see :class:`MaskMatcher`.
        """
        super().__init__(
            class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight
        )

    def mask_costs(self, masks: Tensor, target_masks: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`MaskMatcher.mask_costs`."""
        size = masks.shape[-2:]
        targets = F.interpolate(target_masks[:, None].to(masks.dtype), size=size, mode="nearest")
        logits, targets = masks.flatten(1), targets.flatten(1)
        return focal_cost(logits, targets), dice_cost(logits, targets)


class Mask2FormerMatcher(MaskMatcher):
    """Cross entropy and dice cost at random points, the same for all masks of an image."""

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        num_points: int = 12544,
    ) -> None:
        """
        Args:
            class_weight, mask_weight, dice_weight: see :class:`MaskMatcher`.
            num_points: for each image.
        """
        super().__init__(
            class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight
        )
        self.num_points = num_points

    def mask_costs(self, masks: Tensor, target_masks: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`MaskMatcher.mask_costs`."""
        points = random_points(1, self.num_points, masks)
        logits = sample_points(masks[None], points)[0]
        # Targets are not rounded: at their edges they are fractions.
        targets = sample_points(target_masks[None].to(masks.dtype), points)[0]
        return cross_entropy_cost(logits, targets), dice_cost(logits, targets)


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """(Q, K + 1) logits and (N,) classes to (Q, N): minus the probability of the class."""
    return -logits.softmax(dim=-1)[:, labels]


def focal_cost(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2) -> Tensor:
    """Focal loss (arXiv 1708.02002) of each pair, the mean over P pixels.

    Args:
        logits: (Q, P).
        targets: (N, P) in [0, 1].
        alpha: weight of the pixels inside; the others have 1 - alpha.
        gamma: focusing exponent.

    Returns:
        (Q, N).
    """
    probability = logits.sigmoid()
    inside = alpha * (1 - probability) ** gamma * F.softplus(-logits)
    outside = (1 - alpha) * probability**gamma * F.softplus(logits)
    return (inside @ targets.T + outside @ (1 - targets).T) / logits.shape[1]


def cross_entropy_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of each pair, the mean over P points: (Q, P) and (N, P) to (Q, N)."""
    cost = F.softplus(-logits) @ targets.T + F.softplus(logits) @ (1 - targets).T
    return cost / logits.shape[1]


def dice_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss of each pair: (Q, P) and (N, P) to (Q, N)."""
    probability = logits.sigmoid()
    overlap = 2 * (probability @ targets.T)
    total = probability.sum(dim=1)[:, None] + targets.sum(dim=1)[None]
    return 1 - (overlap + 1) / (total + 1)
