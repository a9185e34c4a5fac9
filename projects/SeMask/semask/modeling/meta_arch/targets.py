"""The annotations of an image as masks for mask classification."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from semask.errors import DataError


def class_masks(sem_seg: Tensor, ignore_value: int) -> Instances:
    """One mask for each class of a label map.

    Args:
        sem_seg: (H, W) int64.
        ignore_value: label of pixels without a class.

    Returns:
        Instances of the size (H, W) with "gt_classes" (N,) int64, ascending, and "gt_masks"
        (N, H, W) bool; N can be 0.
    """
    classes = sem_seg.unique()
    classes = classes[classes != ignore_value]
    instances = Instances((sem_seg.shape[0], sem_seg.shape[1]))
    instances.gt_classes = classes
    instances.gt_masks = sem_seg[None] == classes[:, None, None]
    return instances


def pad(maps: Tensor, size: tuple[int, int], value: int) -> Tensor:
    """(..., h, w) to (..., *size), with ``value`` at the right and below."""
    height, width = maps.shape[-2:]
    if (height, width) == size:
        return maps
    padded = maps.new_full((*maps.shape[:-2], *size), value)
    padded[..., :height, :width] = maps
    return padded


def as_tensor(masks: Any, height: int, width: int) -> Tensor:
    """Masks as a tensor or as Detectron2's ``BitMasks`` or ``PolygonMasks``, to (N, H, W) bool."""
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, height, width)
    tensor: Tensor = masks.tensor if isinstance(masks, BitMasks) else masks
    return tensor.bool()


def instance_masks(instances: Instances, height: int, width: int, source: str) -> Tensor:
    """The masks of an image's N instances; Detectron2's mappers leave them out where N is 0.

    Args:
        instances: with "gt_masks" where N is not 0.
        height, width: of the image.
        source: see :func:`source_of`.

    Returns:
        (N, H, W) bool.

    Raises:
        DataError: there are none, but N is not 0.
    """
    if instances.has("gt_masks"):
        return as_tensor(instances.gt_masks, height, width)
    if len(instances):
        raise DataError(
            f"{source} has {len(instances)} instances without masks; mask classification needs "
            "masks: set INPUT.DATASET_MAPPER_NAME, and add 'segmentation' to the annotations."
        )
    return torch.zeros(0, height, width, dtype=torch.bool)


def annotation(inputs: Mapping[str, Any], name: str) -> Any:
    """The entry of an input.

    Args:
        inputs: what a mapper made of an image.
        name: of the entry.

    Raises:
        DataError: it is missing.
    """
    if name not in inputs:
        raise DataError(
            f"{source_of(inputs)} has no '{name}', which this model needs for training: "
            "INPUT.DATASET_MAPPER_NAME 'mask_former_semantic' creates it."
        )
    return inputs[name]


def source_of(inputs: Mapping[str, Any]) -> str:
    """The image file of an input, for messages."""
    return f"The image '{inputs['file_name']}'" if "file_name" in inputs else "An input"
