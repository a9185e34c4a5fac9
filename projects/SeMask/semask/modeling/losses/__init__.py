"""Losses."""

from semask.modeling.losses.cross_entropy import REDUCTIONS, SegmentationLoss
from semask.modeling.losses.mask_losses import (
    Mask2FormerCriterion,
    MaskCriterion,
    MaskFormerCriterion,
)
from semask.modeling.losses.matcher import (
    Mask2FormerMatcher,
    MaskFormerMatcher,
    MaskMatcher,
    MaskTarget,
)

__all__ = [
    "REDUCTIONS",
    "Mask2FormerCriterion",
    "Mask2FormerMatcher",
    "MaskCriterion",
    "MaskFormerCriterion",
    "MaskFormerMatcher",
    "MaskMatcher",
    "MaskTarget",
    "SegmentationLoss",
]
