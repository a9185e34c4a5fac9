"""The model: backbone (features and priors), heads, losses."""

from .backbone import SemanticAttention, SemanticLayer, SeMaskFPN, SeMaskSwin, SemSegBackbone
from .heads import SemanticFPNHead, SemanticPriorHead, SeMaskFPNHead
from .losses import segmentation_loss
from .prior_supervision import (
    PriorLoss,
    PriorSupervision,
    SeMaskGeneralizedRCNN,
    SeMaskPanopticFPN,
    SeMaskRetinaNet,
)
from .protocol import MultiScale, SlidingWindow, TestProtocol, WholeImage, build_test_protocol
from .scores import Scores
from .segmentor import SeMaskSegmentor, check_protocol

__all__ = [
    "MultiScale",
    "PriorLoss",
    "PriorSupervision",
    "Scores",
    "SeMaskFPN",
    "SeMaskFPNHead",
    "SeMaskGeneralizedRCNN",
    "SeMaskPanopticFPN",
    "SeMaskRetinaNet",
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
