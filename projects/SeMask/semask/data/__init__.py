"""Datasets, and the way from a file to what the model takes."""

from . import datasets
from .datasets import register_config_folders, register_folder
from .mapper import SemSegMapper
from .reading import DataError, register_label_map

__all__ = [
    "DataError",
    "SemSegMapper",
    "datasets",
    "register_config_folders",
    "register_folder",
    "register_label_map",
]
