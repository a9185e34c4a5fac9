"""Annotation files for instance and panoptic segmentation, made from downloaded datasets."""

from semask.data.preparation.ade20k import prepare_ade20k
from semask.data.preparation.cityscapes import prepare_cityscapes

# The functions of `semask prepare NAME`.
PREPARATIONS = {"ade20k": prepare_ade20k, "cityscapes": prepare_cityscapes}

__all__ = ["PREPARATIONS", "prepare_ade20k", "prepare_cityscapes"]
