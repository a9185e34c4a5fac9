"""The decoders' 3x3 convolution with its normalisation and activation."""

from collections.abc import Callable
from functools import partial

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from semask.ops import winograd
from semask.ops.parameter_cache import ParameterCache
from semask.ops.tracing import traced


class Conv3x3(Conv2d):
    """Detectron2's ``Conv2d`` with stride 1 and zero padding 1, optionally in a faster form.

    Args:
        in_channels, out_channels: C and O.
        norm: applied to the output, or None; without one there is a bias.
        activation: applied last, or None.
        winograd: compute as :mod:`semask.ops.winograd` does, in evaluation with the
            normalisation folded into the filters, which are scaled instead of the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        winograd: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size=3,
            padding=1,
            bias=norm is None,
            norm=norm,
            activation=activation,
        )
        self.winograd = winograd
        self._folded: ParameterCache[tuple[Tensor, Tensor]] = ParameterCache()

    def train(self, mode: bool = True) -> "Conv3x3":
        self._folded.clear()
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, O, H, W)."""
        if not self.winograd or traced() or x.numel() == 0:
            return super().forward(x)
        if not torch.is_grad_enabled() and _can_be_folded(self.norm):
            x = self._evaluate(x)
        else:
            x = winograd.convolution(x, self.weight)
            x = x if self.bias is None else x + self.bias[:, None, None]
            x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)

    def is_local(self) -> bool:
        """Whether an output depends on nothing but its 3x3 inputs: a part may go alone."""
        return isinstance(self.norm, FrozenBatchNorm2d) or _can_be_folded(self.norm)

    def _evaluate(self, x: Tensor) -> Tensor:
        """Convolution and normalisation in one."""
        norm = self.norm
        if norm is None:
            filters, bias = self._folded.get(_transform, self.weight, self.bias)
        else:
            fold = partial(_fold, eps=norm.eps)
            state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            filters, bias = self._folded.get(fold, self.weight, *state)
        x = winograd.convolve(x.permute(0, 2, 3, 1).contiguous(), filters)
        return x.add_(bias).permute(0, 3, 1, 2)


def _can_be_folded(norm: nn.Module | None) -> bool:
    """Whether a normalisation only scales and shifts each channel by known numbers."""
    if norm is None:
        return True
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return False
    return not norm.training and norm.track_running_stats and norm.affine


def _transform(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return winograd.transform_filters(weight), bias


def _fold(
    weight: Tensor, mean: Tensor, var: Tensor, gain: Tensor, shift: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """(conv - mean) / sqrt(var + eps) * gain + shift as a convolution with a bias."""
    scale = gain / torch.sqrt(var + eps)
    filters = winograd.transform_filters(weight * scale[:, None, None, None])
    return filters, shift - mean * scale
