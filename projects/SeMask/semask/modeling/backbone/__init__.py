"""Backbones: hierarchical transformers with semantic layers."""

from semask.modeling.backbone.base import SemSegBackbone
from semask.modeling.backbone.detector_fpn import SeMaskFPN
from semask.modeling.backbone.semantic_layer import SemanticAttention, SemanticLayer
from semask.modeling.backbone.semask_swin import SeMaskSwin

__all__ = ["SeMaskFPN", "SeMaskSwin", "SemSegBackbone", "SemanticAttention", "SemanticLayer"]
