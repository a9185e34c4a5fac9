"""The model: backbone (features and priors), heads, losses."""

from .backbone import SemanticAttention, SemanticLayer, SeMaskSwin, SemSegBackbone
from .heads import SemanticFPNHead, SemanticPriorHead, SeMaskFPNHead
from .losses import segmentation_loss
from .protocol import MultiScale, SlidingWindow, TestProtocol, WholeImage, build_test_protocol
from .segmentor import SeMaskSegmentor, check_protocol

__all__ = [
    "MultiScale",
    "SeMaskFPNHead",
    "SeMaskSegmentor",
    "SeMaskSwin",
    "SemSegBackbone",
    "SemanticAttention",
    "SemanticFPNHead",
    "SemanticLayer",
    "SemanticPriorHead",
    "SlidingWindow",
    "TestProtocol",
    "WholeImage",
    "build_test_protocol",
    "check_protocol",
    "segmentation_loss",
]
