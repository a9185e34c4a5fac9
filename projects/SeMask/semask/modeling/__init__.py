"""The model: backbone (features and priors), heads, losses."""

from .backbone import SeMaskSwin, SemanticAttention, SemanticLayer, SemSegBackbone
from .heads import SeMaskFPNHead, SemanticFPNHead, SemanticPriorHead
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
