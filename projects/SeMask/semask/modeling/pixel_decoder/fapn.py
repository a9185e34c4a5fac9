"""Feature-aligned pyramids (arXiv 2108.07058): FaPN, and MSFaPN behind deformable attention.

The edges of an up-sampled map do not coincide with those of the finer one. The alignment samples
the sum of both with a deformable convolution whose offsets are predicted from the two.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from semask.errors import ConfigError
from semask.modeling.pixel_decoder.base import (
    PixelDecoder,
    init_conv,
    lateral_conv,
    mask_conv,
    output_conv,
)
from semask.modeling.pixel_decoder.deformable import DeformablePixelDecoder
from semask.utils.precision import at_least_float32, autocast_off


class GuidedDeformableConv(nn.Module):
    """A 3x3 convolution whose taps are shifted and weighted by a guide (arXiv 1811.11168, 3.2).

    A plain 3x3 convolution of the guide predicts, for each group of channels and each tap, an
    offset (rows, columns) and, through a sigmoid, a modulation. It starts at zero: no offset,
    modulation 0.5.

    Args:
        channels: C of the input, the guide and the output.
        groups: groups of channels with offsets of their own, a divisor of C.

    Raises:
        ConfigError: the groups do not divide the channels.
    """

    TAPS = 9

    def __init__(self, *, channels: int = 256, groups: int = 8) -> None:
        super().__init__()
        if channels % groups:
            raise ConfigError(
                f"The deformable convolution's {groups} groups do not divide its {channels} "
                "channels (MODEL.SEM_SEG_HEAD.CONVS_DIM)."
            )
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        bound = 1 / math.sqrt(channels * self.TAPS)
        nn.init.uniform_(self.weight, -bound, bound)
        self.num_offsets = 2 * self.TAPS * groups
        self.conv_offset_mask = nn.Conv2d(
            channels, self.num_offsets + self.TAPS * groups, kernel_size=3, padding=1
        )
        for parameter in self.conv_offset_mask.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """
        Args:
            x: (B, C, H, W), the map that is sampled.
            guide: (B, C, H, W), from which offsets and modulation are predicted.

        Returns:
            (B, C, H, W), in float32 at least: the sampling is not done in half precision.
        """
        predicted = self.conv_offset_mask(guide)
        with autocast_off(x.device):
            offsets, modulation = at_least_float32(predicted).split(
                [self.num_offsets, predicted.shape[1] - self.num_offsets], dim=1
            )
            return deform_conv2d(
                at_least_float32(x),
                offsets,
                at_least_float32(self.weight),
                at_least_float32(self.bias),
                padding=1,
                mask=modulation.sigmoid(),
            )


class FeatureAlignment(nn.Module):
    """Align a coarser map, up-sampled, with a finer one and add them.

    Args:
        channels: C of both.
        norm: of the guide; the published models share it, with its parameters, with the convolution
            after the alignment.
        groups: of the deformable convolution.
    """

    def __init__(self, *, channels: int, norm: nn.Module | None, groups: int = 8) -> None:
        super().__init__()
        self.offset = Conv2d(2 * channels, channels, kernel_size=1, bias=norm is None, norm=norm)
        init_conv(self.offset)
        self.dcpack_L2 = GuidedDeformableConv(channels=channels, groups=groups)

    def forward(self, lateral: Tensor, coarser: Tensor) -> Tensor:
        """(B, C, H, W) each, to the same shape."""
        fused = lateral + coarser
        guide = self.offset(torch.cat([lateral, 2 * fused], dim=1))
        return F.relu(self.dcpack_L2(fused, guide)) + lateral


class FaPNPixelDecoder(PixelDecoder):
    """A feature pyramid whose maps of strides 16, 8 and 4 are aligned with those they are added to.

    Published with Mask2Former's transformer decoder; it has no transformer of its own.
    """

    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        channels: int = 256,
        mask_channels: int = 256,
        norm: str = "GN",
        groups: int = 8,
    ) -> None:
        """
        Args:
            input_shape, channels, mask_channels, norm: see :class:`PixelDecoder`.
            groups: of the deformable convolutions.
        """
        super().__init__(
            input_shape=input_shape, channels=channels, mask_channels=mask_channels, norm=norm
        )
        widths = [input_shape[name].channels for name in self.in_features]
        for level, width in enumerate(widths[:-1], start=1):
            layer = output_conv(channels, channels, norm)
            alignment = FeatureAlignment(channels=channels, norm=layer.norm, groups=groups)
            self.add_module(f"adapter_{level}", lateral_conv(width, channels, norm))
            self.add_module(f"align_{level}", alignment)
            self.add_module(f"layer_{level}", layer)
        self.layer_4 = output_conv(widths[-1], channels, norm)
        self.mask_features = mask_conv(channels, mask_channels, kernel_size=3)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`PixelDecoder.forward`."""
        *finer, coarsest = self.pick(features)
        maps = [self.layer_4(coarsest)]
        for level in (3, 2, 1):
            lateral = self.get_submodule(f"adapter_{level}")(finer[level - 1])
            coarser = F.interpolate(maps[-1], size=lateral.shape[-2:], mode="nearest")
            aligned = self.get_submodule(f"align_{level}")(lateral, coarser)
            maps.append(self.get_submodule(f"layer_{level}")(aligned))
        return self.mask_features(maps[-1]), maps[:-1]


class MSFaPNPixelDecoder(DeformablePixelDecoder):
    """Mask2Former's pixel decoder whose map of stride 4 is aligned with that of stride 8."""

    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        channels: int = 256,
        mask_channels: int = 256,
        norm: str = "GN",
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        hidden_channels: int = 1024,
        dropout: float = 0.0,
        groups: int = 8,
    ) -> None:
        """See :class:`DeformablePixelDecoder` and :class:`FaPNPixelDecoder`."""
        super().__init__(
            input_shape=input_shape,
            channels=channels,
            mask_channels=mask_channels,
            norm=norm,
            num_layers=num_layers,
            num_heads=num_heads,
            num_points=num_points,
            hidden_channels=hidden_channels,
            dropout=dropout,
        )
        self.align_1 = FeatureAlignment(channels=channels, norm=self.layer_1.norm, groups=groups)

    def fuse(self, lateral: Tensor, coarser: Tensor) -> Tensor:
        """See :meth:`DeformablePixelDecoder.fuse`."""
        return self.align_1(lateral, coarser)
