"""Datasets: from files to the model's input."""

from semask.data import datasets
from semask.data.datasets import (
    register_coco_folder,
    register_config_folders,
    register_folder,
    register_panoptic_folder,
)
from semask.data.mappers.instance import InstanceMapper
from semask.data.mappers.mask_semantic import MaskFormerSemanticMapper
from semask.data.mappers.panoptic import PanopticMapper
from semask.data.mappers.prior_target import PriorTarget
from semask.data.mappers.semantic import SemSegMapper, register_semantic_mapper
from semask.data.reading import register_label_map
from semask.errors import DataError

__all__ = [
    "DataError",
    "InstanceMapper",
    "MaskFormerSemanticMapper",
    "PanopticMapper",
    "PriorTarget",
    "SemSegMapper",
    "datasets",
    "register_coco_folder",
    "register_config_folders",
    "register_folder",
    "register_label_map",
    "register_panoptic_folder",
    "register_semantic_mapper",
]
