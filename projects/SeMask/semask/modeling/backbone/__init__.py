"""Backbones: hierarchical transformers with semantic layers."""

from .base import SemSegBackbone
from .semantic_layer import SemanticAttention, SemanticLayer
from .semask_fpn import SeMaskFPN
from .semask_swin import SeMaskSwin

__all__ = ["SeMaskFPN", "SeMaskSwin", "SemSegBackbone", "SemanticAttention", "SemanticLayer"]
