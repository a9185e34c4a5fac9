"""Decoders and the heads that combine them."""

from .semantic_fpn import SemanticFPNHead
from .semantic_prior import SemanticPriorHead
from .semask_fpn import SeMaskFPNHead

__all__ = ["SeMaskFPNHead", "SemanticFPNHead", "SemanticPriorHead"]
