"""Backbones: hierarchical encoders with semantic layers."""

from semask.modeling.backbone.base import SemSegBackbone
from semask.modeling.backbone.detector_fpn import SeMaskFPN
from semask.modeling.backbone.encoder import HierarchicalEncoder
from semask.modeling.backbone.semantic_layer import SemanticAttention, SemanticLayer
from semask.modeling.backbone.semask import SeMaskBackbone
from semask.modeling.backbone.semask_swin import SeMaskSwin
from semask.modeling.backbone.swin import SwinTransformer

__all__ = [
    "HierarchicalEncoder",
    "SeMaskBackbone",
    "SeMaskFPN",
    "SeMaskSwin",
    "SemSegBackbone",
    "SemanticAttention",
    "SemanticLayer",
    "SwinTransformer",
]
