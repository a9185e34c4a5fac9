"""Semantic segmentation for mask classification: a mask for each class of an image.

The training pipeline of MaskFormer (arXiv 2107.06278) and Mask2Former (arXiv 2112.01527) and of
SeMask's models with these decoders.
"""

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from semask.data.mappers.semantic import (
    SemSegMapper,
    build_crop,
    build_distortion,
    build_flip,
    errors_naming,
    register_semantic_mapper,
)
from semask.data.transforms.resizing import PadToSquare, ResizeShortEdge
from semask.modeling.meta_arch.targets import class_masks


def build_mask_augmentations(
    cfg: CfgNode, is_train: bool, *, label_interpolation: str | None = None
) -> list[T.Augmentation]:
    """Resize the shorter side, crop, distort, flip, pad to a square; in evaluation resize alone.

    Args:
        cfg: ``INPUT.MIN_SIZE_TRAIN``, ``MAX_SIZE_TRAIN``, ``MIN_SIZE_TEST``, ``MAX_SIZE_TEST``,
            ``CROP``, ``PHOTOMETRIC_DISTORTION``, ``RANDOM_FLIP``, ``SIZE_DIVISIBILITY`` and
            ``LABEL_INTERPOLATION``.
        is_train: the random pipeline.
        label_interpolation: replaces ``INPUT.LABEL_INTERPOLATION``.

    Raises:
        ConfigError: a value cannot be used; it names the key.
    """
    inputs = cfg.INPUT
    if not is_train:
        with errors_naming("INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST"):
            return [ResizeShortEdge([inputs.MIN_SIZE_TEST], inputs.MAX_SIZE_TEST)]
    with errors_naming("INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, LABEL_INTERPOLATION"):
        augmentations: list[T.Augmentation] = [
            ResizeShortEdge(
                list(inputs.MIN_SIZE_TRAIN),
                inputs.MAX_SIZE_TRAIN,
                label_interpolation=label_interpolation or inputs.LABEL_INTERPOLATION,
            )
        ]
    augmentations += build_crop(cfg)
    augmentations += build_distortion(cfg, hue_inclusive=True)
    augmentations += build_flip(cfg)
    if inputs.SIZE_DIVISIBILITY > 0:
        ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        augmentations.append(PadToSquare(inputs.SIZE_DIVISIBILITY, ignore_value=ignore_value))
    return augmentations


def build_mask_test_scales(cfg: CfgNode) -> list[ResizeShortEdge]:
    """The sizes of the multi-scale protocol, ``TEST.AUG.MIN_SIZES`` up to ``MAX_SIZE``.

    Raises:
        ConfigError: they cannot be used.
    """
    if cfg.TEST.PROTOCOL != "multi_scale":
        return []
    with errors_naming("TEST.AUG.MIN_SIZES, MAX_SIZE"):
        return [ResizeShortEdge([size], cfg.TEST.AUG.MAX_SIZE) for size in cfg.TEST.AUG.MIN_SIZES]


@register_semantic_mapper("mask_former_semantic")
class MaskFormerSemanticMapper(SemSegMapper):
    """As :class:`SemSegMapper`; in training also "instances", one for each class of the image."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            **super().from_config(cfg, is_train),
            "augmentations": build_mask_augmentations(cfg, is_train),
            "test_scales": [] if is_train else build_mask_test_scales(cfg),
            "rescale_resized": cfg.TEST.AUG.FROM_RESIZED,
        }

    def transform(self, image: np.ndarray, sem_seg: np.ndarray | None = None) -> dict[str, Any]:
        """As :meth:`SemSegMapper.transform`, with "instances"; see :func:`class_masks`."""
        output = super().transform(image, sem_seg)
        if sem_seg is not None:
            output["instances"] = class_masks(output["sem_seg"], self.ignore_value)
        return output
