"""Detectron2's convolution with its normalisation and activation.

3x3 by Winograd's products; 1x1 of channels-last maps as linear layers of their pixels, without a
copy.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from semask.ops import products, winograd
from semask.ops.modes import ParameterCache, is_tracing
from semask.ops.stripes import stripes

# Heads of detectors convolve hundreds of small maps at a time, for which the plain form is faster.
MOST_MAPS = 32
# Maps of this size are normalised in place.
LARGE_BYTES = 2**27


class WinogradConv2d(Conv2d):
    """3x3 convolutions of stride 1 that keep the map's size; others use the plain form.

    In evaluation the normalisation is folded into the filters.
    """

    def set_up(self) -> None:
        """Called once on each module that becomes one of these."""
        self._folded: ParameterCache[Any] = ParameterCache()

    def train(self, mode: bool = True) -> "WinogradConv2d":
        """See ``nn.Module``."""
        self._folded.clear()
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, O, H, W)."""
        if not self.is_3x3() or is_tracing() or not 0 < len(x) <= MOST_MAPS or x.numel() == 0:
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        if not torch.is_grad_enabled() and can_be_folded(self.norm):
            x = self._evaluate(x)
        else:
            x = winograd.convolution(x, self.weight)
            x = x if self.bias is None else x + self.bias[:, None, None]
            return _finished(self, x)
        return x if self.activation is None else self.activation(x)

    def is_3x3(self) -> bool:
        """Whether Winograd's products compute it."""
        return (
            self.kernel_size == (3, 3)
            and self.padding == self.stride == self.dilation == (1, 1)
            and self.groups == 1
            and self.padding_mode == "zeros"
        )

    def _evaluate(self, x: Tensor) -> Tensor:
        """Convolution and normalisation in one."""
        norm = self.norm
        if norm is None:
            filters, bias = self._folded.get(_transform, self.weight), self.bias
        else:
            fold = partial(_fold, eps=norm.eps)
            state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            own = () if self.bias is None else (self.bias,)
            filters, bias = self._folded.get(fold, self.weight, *state, *own)
        x = winograd.convolve(x.permute(0, 2, 3, 1).contiguous(), filters)
        x = x if bias is None else x.add_(bias)
        return x.permute(0, 3, 1, 2)


class LinearConv2d(Conv2d):
    """Detectron2's 1x1 convolutions, normalisation and activation; others use the plain form."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, O, H, W)."""
        if not is_linear(self, x):
            return super().forward(x)
        return _finished(self, linear(self, x))


class PlainLinearConv2d(nn.Conv2d):
    """PyTorch's 1x1 convolutions; others use the plain form."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, O, H, W)."""
        return linear(self, x) if is_linear(self, x) else super().forward(x)


def is_linear(conv: _ConvNd, x: Tensor) -> bool:
    """Whether a convolution is 1x1 and the channels of a pixel of ``x`` are contiguous."""
    pointwise = (
        conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    )
    return pointwise and x.dim() == 4 and x.permute(0, 2, 3, 1).is_contiguous() and not is_tracing()


def linear(conv: _ConvNd, x: Tensor) -> Tensor:
    """``conv(x)`` of a 1x1 convolution, in channels_last."""
    out = products.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)
    return out.permute(0, 3, 1, 2)


def convolve_(conv: Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``, in the memory of ``x`` where it is large and the convolution allows it.

    Args:
        conv: with its normalisation and activation.
        x: (B, C, H, W), not used again.
    """
    height, width = x.shape[-2:]
    if not is_large(x) or x.shape[1] != conv.out_channels or torch.is_grad_enabled():
        return conv(x)
    pixels = x.permute(0, 2, 3, 1)
    if isinstance(conv, LinearConv2d) and is_linear(conv, x):
        for image in pixels:
            for rows in stripes(height, image[0].nbytes, x.device):
                image[rows] = products.linear(image[rows], conv.weight.flatten(1), conv.bias)
    elif (
        isinstance(conv, WinogradConv2d)
        and conv.is_3x3()
        and conv.bias is None
        and not can_be_folded(conv.norm)
        and pixels.is_contiguous()
        and height % 2 == width % 2 == 0
    ):
        winograd.convolve(pixels, winograd.transform_filters(conv.weight), out=pixels)
    else:
        return conv(x)
    return _finished(conv, x)


def is_large(x: Tensor) -> bool:
    """Whether a map is so large that its copies count."""
    return x.numel() * x.element_size() >= LARGE_BYTES


def _finished(conv: Conv2d, x: Tensor) -> Tensor:
    """Normalisation and activation of a convolution's output, in place where it is large."""
    norm = conv.norm
    if norm is None or torch.is_grad_enabled() or type(norm) is not nn.GroupNorm:
        x = x if norm is None else norm(x)
        return x if conv.activation is None else conv.activation(x)
    x = normalize_(norm, x) if is_large(x) and norm.affine else norm(x)
    if conv.activation is None:
        return x
    return x.relu_() if conv.activation is F.relu else conv.activation(x)


def normalize_(norm: Any, x: Tensor) -> Tensor:
    """GroupNorm of channels-last maps (B, C, H, W), in place."""
    groups = x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (norm.num_groups, -1))
    variance, mean = torch.var_mean(groups, dim=(1, 3), correction=0, keepdim=True)
    scale = norm.weight.view(groups.shape[2:]) * (variance + norm.eps).rsqrt()
    shift = norm.bias.view(groups.shape[2:]) - mean * scale
    for image, own_scale, own_shift in zip(groups, scale, shift, strict=True):
        image.mul_(own_scale).add_(own_shift)
    return x


def is_local(conv: Conv2d) -> bool:
    """Whether an output depends on its 3x3 inputs only, so that a map can be split into bands."""
    return isinstance(conv.norm, FrozenBatchNorm2d) or can_be_folded(conv.norm)


def can_be_folded(norm: nn.Module | None) -> bool:
    """Whether a normalisation scales and shifts each channel by constants."""
    if norm is None:
        return True
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return False
    return not norm.training and norm.track_running_stats and norm.affine


def _transform(weight: Tensor) -> Tensor:
    return winograd.transform_filters(weight)


def _fold(
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    gain: Tensor,
    shift: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(conv + bias - mean) / sqrt(var + eps) * gain + shift as a convolution with a bias."""
    scale = gain / torch.sqrt(var + eps)
    filters = winograd.transform_filters(weight * scale[:, None, None, None])
    mean = mean if bias is None else mean - bias
    return filters, shift - mean * scale
