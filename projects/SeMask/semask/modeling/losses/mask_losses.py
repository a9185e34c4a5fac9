"""The losses of MaskFormer and Mask2Former: class, mask and dice, for every decoder layer."""

import logging
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.layers.resize import resize
from semask.modeling.losses.divisor import Divisor
from semask.modeling.losses.matcher import MaskMatcher, MaskTarget, Match
from semask.modeling.losses.point_sampling import sample_points, uncertain_points
from semask.modeling.mask_decoder.base import MaskPrediction
from semask.utils.precision import at_least_float32, autocast_off

logger = logging.getLogger(__name__)


class MaskCriterion(nn.Module):
    """Match queries with targets; each query is supervised with its target's class and mask.

    Queries without a target learn the class "no object" and no mask. Everything is computed in
    float32 or better, whatever precision the predictions have.
    """

    def __init__(
        self,
        *,
        matcher: MaskMatcher,
        class_weight: float,
        mask_weight: float,
        dice_weight: float,
        no_object_weight: float = 0.1,
    ) -> None:
        """
        Args:
            matcher: of queries with targets; its weights may differ from those of the losses.
            class_weight, mask_weight, dice_weight: of the three losses.
            no_object_weight: of the class "no object" in the class loss; the others have 1.
        """
        super().__init__()
        self.matcher = matcher
        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.no_object_weight = no_object_weight

    def forward(
        self, predictions: Sequence[MaskPrediction], targets: Sequence[MaskTarget]
    ) -> dict[str, Tensor]:
        """The weighted losses of a batch.

        Args:
            predictions: of the decoder's layers, the final one last.
            targets: of the images.

        Returns:
            "loss_ce", "loss_mask" and "loss_dice" of the final prediction, and the same with
            "_0", "_1", ... for the others. Where a matching cost is not finite, "loss_ce" is NaN,
            so that all processes of a training stop together.
        """
        *aux, final = predictions
        named = [("", final)] + [(f"_{i}", prediction) for i, prediction in enumerate(aux)]
        with autocast_off(final.logits.device):
            num_masks = mean_number_of_masks(targets, final.logits).clamp(min=1)
            losses: dict[str, Tensor] = {}
            for suffix, prediction in named:
                for name, loss in self._losses(prediction, targets, num_masks).items():
                    losses[name + suffix] = loss
        return losses

    def divisors(self, targets: Sequence[MaskTarget], num_queries: int) -> dict[str, Divisor]:
        """What the losses of a batch are divided by, in every decoder layer.

        Args:
            targets: of the images.
            num_queries: Q, of each image.
        """
        matched = sum(min(len(target.labels), num_queries) for target in targets)
        others = num_queries * len(targets) - matched
        like = targets[0].masks.new_zeros((), dtype=torch.float32)
        masks = Divisor(float(mean_number_of_masks(targets, like)))
        return {
            "loss_ce": Divisor(matched + self.no_object_weight * others, least=0.0),
            "loss_mask": masks,
            "loss_dice": masks,
        }

    def _losses(
        self, prediction: MaskPrediction, targets: Sequence[MaskTarget], num_masks: Tensor
    ) -> dict[str, Tensor]:
        logits = at_least_float32(prediction.logits)
        masks = at_least_float32(prediction.masks)
        matches = self.matcher(MaskPrediction(logits, masks), targets)
        loss_class = class_loss(
            logits, matched_labels(prediction, targets, matches), self.no_object_weight
        )
        broken = [i for i, match in enumerate(matches) if not match.finite]
        if broken:
            logger.error(
                "Matching masks with queries met NaN or infinite logits, in image %s of the batch",
                ", ".join(map(str, broken)),
            )
            loss_class = loss_class * float("nan")
        goals = [
            target.masks[match.targets] for target, match in zip(targets, matches, strict=True)
        ]
        pairs = at_least_float32(self.matched_masks(prediction, matches))
        loss_mask, loss_dice = self.mask_losses(pairs, torch.cat(goals))
        return {
            "loss_ce": self.class_weight * loss_class,
            "loss_mask": self.mask_weight * loss_mask.sum() / num_masks,
            "loss_dice": self.dice_weight * loss_dice.sum() / num_masks,
        }

    def matched_masks(self, prediction: MaskPrediction, matches: Sequence[Match]) -> Tensor:
        """The mask logits of the M pairs of a batch, image by image: (M, h, w)."""
        return torch.cat(
            [masks[match.queries] for masks, match in zip(prediction.masks, matches, strict=True)]
        )

    @abstractmethod
    def mask_losses(self, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of M pairs.

        Args:
            masks: (M, h, w) logits.
            targets: (M, H, W) bool.

        Returns:
            Mask loss and dice loss, (M,) each.
        """


class MaskFormerCriterion(MaskCriterion):
    """Focal and dice loss at all pixels of the image (arXiv 2107.06278, section 3.3)."""

    def __init__(
        self,
        *,
        matcher: MaskMatcher,
        class_weight: float = 1.0,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object_weight: float = 0.1,
    ) -> None:
        """
        Args:
            matcher, class_weight, mask_weight, dice_weight, no_object_weight: see
                :class:`MaskCriterion`.
        """
        super().__init__(
            matcher=matcher,
            class_weight=class_weight,
            mask_weight=mask_weight,
            dice_weight=dice_weight,
            no_object_weight=no_object_weight,
        )

    def mask_losses(self, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`MaskCriterion.mask_losses`."""
        logits = resize(masks[:, None], targets.shape[-2:]).flatten(1)
        goal = targets.flatten(1).to(logits.dtype)
        return focal_loss(logits, goal), dice_loss(logits, goal)


class Mask2FormerCriterion(MaskCriterion):
    """Cross entropy and dice loss at points of each pair (arXiv 2112.01527, section 3.3)."""

    def __init__(
        self,
        *,
        matcher: MaskMatcher,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ) -> None:
        """
        Args:
            matcher, class_weight, mask_weight, dice_weight, no_object_weight: see
                :class:`MaskCriterion`.
            num_points: for each pair.
            oversample_ratio, importance_sample_ratio: see
                :func:`semask.modeling.losses.point_sampling.uncertain_points`.

        Raises:
            ConfigError: the numbers of points cannot be used.
        """
        super().__init__(
            matcher=matcher,
            class_weight=class_weight,
            mask_weight=mask_weight,
            dice_weight=dice_weight,
            no_object_weight=no_object_weight,
        )
        if num_points < 1:
            raise ConfigError(
                f"MODEL.MASK_FORMER.TRAIN_NUM_POINTS must be 1 or more, got {num_points}."
            )
        if oversample_ratio < 1:
            raise ConfigError(
                f"MODEL.MASK_FORMER.OVERSAMPLE_RATIO must be 1 or more, got {oversample_ratio}."
            )
        if not 0 <= importance_sample_ratio <= 1:
            raise ConfigError(
                "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO must be in [0, 1], got "
                f"{importance_sample_ratio}."
            )
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio

    def mask_losses(self, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`MaskCriterion.mask_losses`."""
        points = uncertain_points(
            masks.detach(),
            self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_sample_ratio=self.importance_sample_ratio,
        )
        logits = sample_points(masks[:, None], points)[:, 0]
        goal = sample_points(targets[:, None].to(masks.dtype), points)[:, 0]
        return cross_entropy_loss(logits, goal), dice_loss(logits, goal)


def class_loss(logits: Tensor, labels: Tensor, no_object_weight: float) -> Tensor:
    """Weighted mean of the cross entropy over all queries.

    Args:
        logits: (B, Q, K + 1).
        labels: (B, Q) int64; K = "no object".
        no_object_weight: of that class.

    Returns:
        A scalar.
    """
    weight = logits.new_ones(logits.shape[-1])
    weight[-1] = no_object_weight
    return F.cross_entropy(logits.transpose(1, 2), labels, weight)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2) -> Tensor:
    """Binary focal loss (arXiv 1708.02002), the mean over P pixels: (M, P) twice to (M,)."""
    probability = logits.sigmoid()
    error = 1 - (probability * targets + (1 - probability) * (1 - targets))
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (weight * error**gamma * entropy).mean(dim=1)


def cross_entropy_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy, the mean over P points: (M, P) twice to (M,)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (twice the overlap + 1) / (sum of the areas + 1): (M, P) twice to (M,)."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * targets).sum(dim=1)
    return 1 - (overlap + 1) / (probability.sum(dim=1) + targets.sum(dim=1) + 1)


def matched_labels(
    prediction: MaskPrediction, targets: Sequence[MaskTarget], matches: Sequence[Match]
) -> Tensor:
    """The target class of each query, (B, Q) int64; K = "no object"."""
    batch, num_queries, num_logits = prediction.logits.shape
    device = prediction.logits.device
    labels = torch.full((batch, num_queries), num_logits - 1, dtype=torch.int64, device=device)
    for row, target, match in zip(labels, targets, matches, strict=True):
        row[match.queries] = target.labels[match.targets]
    return labels


def mean_number_of_masks(targets: Sequence[MaskTarget], like: Tensor) -> Tensor:
    """Targets in a process's batch, averaged over all processes: a scalar.

    Args:
        targets: of this process's images.
        like: sets the device and dtype of the result, which is at least float32.
    """
    number = at_least_float32(like).new_tensor(sum(len(target.labels) for target in targets))
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(number)
        number /= dist.get_world_size()
    return number
