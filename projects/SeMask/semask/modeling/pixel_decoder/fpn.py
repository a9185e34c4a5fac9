"""MaskFormer's pixel decoder, a feature pyramid (arXiv 2107.06278, section 4.1; 1612.03144)."""

from collections.abc import Mapping

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor

from semask.modeling.pixel_decoder.base import PixelDecoder, lateral_conv, mask_conv, output_conv


class FPNPixelDecoder(PixelDecoder):
    """From the coarsest feature down: up-sample to nearest, add the next feature, convolve."""

    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        channels: int = 256,
        mask_channels: int = 256,
        norm: str = "GN",
    ) -> None:
        """See :class:`PixelDecoder`."""
        super().__init__(
            input_shape=input_shape, channels=channels, mask_channels=mask_channels, norm=norm
        )
        widths = [input_shape[name].channels for name in self.in_features]
        # Level i reads feature i - 1; level 4 is the coarsest, with nothing to be added.
        for level, width in enumerate(widths[:-1], start=1):
            self.add_module(f"adapter_{level}", lateral_conv(width, channels, norm))
            self.add_module(f"layer_{level}", output_conv(channels, channels, norm))
        self.layer_4 = output_conv(widths[-1], channels, norm)
        self.mask_features = mask_conv(channels, mask_channels, kernel_size=3)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`PixelDecoder.forward`."""
        *finer, coarsest = self.pick(features)
        maps = [self.layer_4(coarsest)]
        for level in (3, 2, 1):
            lateral = self.get_submodule(f"adapter_{level}")(finer[level - 1])
            coarser = F.interpolate(maps[-1], size=lateral.shape[-2:], mode="nearest")
            maps.append(self.get_submodule(f"layer_{level}")(lateral + coarser))
        return self.mask_features(maps[-1]), maps[:-1]
