"""Backbones: hierarchical transformers with semantic layers."""

from .base import SemSegBackbone
from .semantic_layer import SemanticAttention, SemanticLayer
from .semask_swin import SeMaskSwin

__all__ = ["SeMaskSwin", "SemSegBackbone", "SemanticAttention", "SemanticLayer"]
