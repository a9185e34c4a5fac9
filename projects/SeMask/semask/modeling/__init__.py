"""The model: backbone (features and priors), heads, losses."""

from semask.modeling.backbone import (
    HierarchicalEncoder,
    PriorFPN,
    SemanticAttention,
    SemanticLayer,
    SeMaskBackbone,
    SeMaskSwin,
    SeMaskTimm,
    SemSegBackbone,
    SwinTransformer,
    TimmEncoder,
)
from semask.modeling.heads import (
    MaskClassificationHead,
    PriorSupervision,
    SegmentationHead,
    SemanticFPNDecoder,
    SemanticPriorDecoder,
    SeMaskFPNHead,
    semantic_scores,
)
from semask.modeling.losses import SegmentationLoss
from semask.modeling.meta_arch.detectors import (
    PriorSupervisedDetector,
    SeMaskGeneralizedRCNN,
    SeMaskPanopticFPN,
    SeMaskRetinaNet,
)
from semask.modeling.meta_arch.mask_classification import SeMaskMaskFormer
from semask.modeling.meta_arch.protocol import (
    InferenceProtocol,
    MultiScale,
    SlidingWindow,
    WholeImage,
    build_test_protocol,
)
from semask.modeling.meta_arch.semantic import SeMaskSegmentor, check_protocol

__all__ = [
    "HierarchicalEncoder",
    "InferenceProtocol",
    "MaskClassificationHead",
    "MultiScale",
    "PriorFPN",
    "PriorSupervisedDetector",
    "PriorSupervision",
    "SeMaskBackbone",
    "SeMaskFPNHead",
    "SeMaskGeneralizedRCNN",
    "SeMaskMaskFormer",
    "SeMaskPanopticFPN",
    "SeMaskRetinaNet",
    "SeMaskSegmentor",
    "SeMaskSwin",
    "SeMaskTimm",
    "SegmentationHead",
    "SegmentationLoss",
    "SemSegBackbone",
    "SemanticAttention",
    "SemanticFPNDecoder",
    "SemanticLayer",
    "SemanticPriorDecoder",
    "SlidingWindow",
    "SwinTransformer",
    "TimmEncoder",
    "WholeImage",
    "build_test_protocol",
    "check_protocol",
    "semantic_scores",
]
