"""Backbones: hierarchical encoders with semantic layers."""

from semask.modeling.backbone.contract import HierarchicalEncoder, SemSegBackbone
from semask.modeling.backbone.detector_fpn import PriorFPN
from semask.modeling.backbone.semantic_layer import SemanticAttention, SemanticLayer
from semask.modeling.backbone.semask import SeMaskBackbone
from semask.modeling.backbone.semask_swin import SeMaskSwin
from semask.modeling.backbone.semask_timm import SeMaskTimm
from semask.modeling.backbone.swin import SwinTransformer
from semask.modeling.backbone.timm_encoder import TimmEncoder

__all__ = [
    "HierarchicalEncoder",
    "PriorFPN",
    "SeMaskBackbone",
    "SeMaskSwin",
    "SeMaskTimm",
    "SemSegBackbone",
    "SemanticAttention",
    "SemanticLayer",
    "SwinTransformer",
    "TimmEncoder",
]
