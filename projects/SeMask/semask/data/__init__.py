"""Datasets, and the way from a file to what the model takes."""

from . import datasets
from .mapper import SemSegMapper
from .reading import DataError

__all__ = ["DataError", "SemSegMapper", "datasets"]
