"""The protocol of segmentation heads, the heads, and the supervision of the priors."""

from semask.modeling.heads.base import ScoreKind, SegmentationHead, semantic_scores
from semask.modeling.heads.mask_classification import MaskClassificationHead
from semask.modeling.heads.per_pixel import SeMaskFPNHead
from semask.modeling.heads.prior import PriorSupervision, SemanticPriorDecoder
from semask.modeling.pixel_decoder.semantic_fpn import SemanticFPNDecoder

__all__ = [
    "MaskClassificationHead",
    "PriorSupervision",
    "ScoreKind",
    "SeMaskFPNHead",
    "SegmentationHead",
    "SemanticFPNDecoder",
    "SemanticPriorDecoder",
    "semantic_scores",
]
