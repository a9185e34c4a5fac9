"""Losses."""

from semask.modeling.losses.cross_entropy import REDUCTIONS, segmentation_loss

__all__ = ["REDUCTIONS", "segmentation_loss"]
