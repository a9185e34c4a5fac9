"""The model: backbone (features and priors), heads, losses."""

from semask.modeling.backbone import (
    HierarchicalEncoder,
    SemanticAttention,
    SemanticLayer,
    SeMaskBackbone,
    SeMaskFPN,
    SeMaskSwin,
    SemSegBackbone,
    SwinTransformer,
)
from semask.modeling.heads import SemanticFPNHead, SemanticPriorHead, SeMaskFPNHead
from semask.modeling.losses import segmentation_loss
from semask.modeling.meta_arch.detectors import (
    PriorLoss,
    PriorSupervision,
    SeMaskGeneralizedRCNN,
    SeMaskPanopticFPN,
    SeMaskRetinaNet,
)
from semask.modeling.meta_arch.protocol import (
    MultiScale,
    SlidingWindow,
    TestProtocol,
    WholeImage,
    build_test_protocol,
)
from semask.modeling.meta_arch.semantic import SeMaskSegmentor, check_protocol
from semask.ops.scores import Scores

__all__ = [
    "HierarchicalEncoder",
    "MultiScale",
    "PriorLoss",
    "PriorSupervision",
    "Scores",
    "SeMaskBackbone",
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
    "SwinTransformer",
    "TestProtocol",
    "WholeImage",
    "build_test_protocol",
    "check_protocol",
    "segmentation_loss",
]
