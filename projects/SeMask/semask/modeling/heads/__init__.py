"""Decoders and the heads that combine them."""

from semask.modeling.heads.per_pixel import SeMaskFPNHead
from semask.modeling.heads.prior import SemanticPriorHead
from semask.modeling.pixel_decoder.semantic_fpn import SemanticFPNHead

__all__ = ["SeMaskFPNHead", "SemanticFPNHead", "SemanticPriorHead"]
