"""From the backbone's features to one map, or to one fine map and several coarser ones."""

from semask.modeling.pixel_decoder.base import PixelDecoder
from semask.modeling.pixel_decoder.deformable import DeformablePixelDecoder
from semask.modeling.pixel_decoder.fapn import FaPNPixelDecoder, MSFaPNPixelDecoder
from semask.modeling.pixel_decoder.fpn import FPNPixelDecoder

__all__ = [
    "DeformablePixelDecoder",
    "FPNPixelDecoder",
    "FaPNPixelDecoder",
    "MSFaPNPixelDecoder",
    "PixelDecoder",
]
