"""Transformer decoders that turn learnt queries into a class and a mask each."""

from semask.modeling.mask_decoder.base import MaskDecoder, MaskPrediction
from semask.modeling.mask_decoder.mask2former import Mask2FormerDecoder
from semask.modeling.mask_decoder.maskformer import MaskFormerDecoder

__all__ = ["Mask2FormerDecoder", "MaskDecoder", "MaskFormerDecoder", "MaskPrediction"]
