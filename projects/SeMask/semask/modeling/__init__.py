"""The model: backbone (features and priors), heads, losses."""

from .backbone import SemanticAttention, SemanticLayer, SeMaskSwin, SemSegBackbone
from .heads import SemanticFPNHead, SemanticPriorHead, SeMaskFPNHead
from .losses import segmentation_loss
from .segmentor import SeMaskSegmentor

__all__ = [
    "SeMaskFPNHead",
    "SeMaskSegmentor",
    "SeMaskSwin",
    "SemSegBackbone",
    "SemanticAttention",
    "SemanticFPNHead",
    "SemanticLayer",
    "SemanticPriorHead",
    "segmentation_loss",
]
