"""Datasets, and the way from a file to what the model takes."""

from . import datasets
from .build import build_mapper
from .datasets import register_coco_folder, register_config_folders, register_folder
from .instance_mapper import InstanceMapper
from .mapper import SemSegMapper
from .prior_target import PriorTarget
from .reading import DataError, register_label_map

__all__ = [
    "DataError",
    "InstanceMapper",
    "PriorTarget",
    "SemSegMapper",
    "build_mapper",
    "datasets",
    "register_coco_folder",
    "register_config_folders",
    "register_folder",
    "register_label_map",
]
