"""Modulated deformable convolution, guided by another map (arXiv 1811.11168, section 3.2)."""

import math

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from semask.utils.precision import at_least_float32, autocast_off


class GuidedDeformableConv(nn.Module):
    """A 3x3 convolution whose taps are shifted and weighted by a guide.

    A plain 3x3 convolution of the guide predicts, for each group of channels and each tap, an
    offset (rows, columns) and, through a sigmoid, a modulation. It starts at zero: no offset,
    modulation 0.5.

    Args:
        channels: C of the input, the guide and the output.
        groups: groups of channels with offsets of their own, a divisor of C.

    Raises:
        ValueError: the groups do not divide the channels.
    """

    TAPS = 9

    def __init__(self, *, channels: int = 256, groups: int = 8) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(
                f"The deformable convolution's {groups} groups do not divide its {channels} "
                "channels (MODEL.SEM_SEG_HEAD.CONVS_DIM)"
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
