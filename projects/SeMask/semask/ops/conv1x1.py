"""1x1 convolutions of maps that lie in channels_last: linear layers of their pixels, uncopied."""

import detectron2.layers
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from semask.ops.tracing import traced


class LinearConv2d(detectron2.layers.Conv2d):
    """Detectron2's convolution with its normalisation and activation; others than 1x1 stay."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, O, H, W)."""
        if not is_linear(self, x):
            return super().forward(x)
        x = linear(self, x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class PlainLinearConv2d(nn.Conv2d):
    """PyTorch's convolution; others than 1x1 stay."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, O, H, W)."""
        return linear(self, x) if is_linear(self, x) else super().forward(x)


def is_linear(conv: _ConvNd, x: Tensor) -> bool:
    """Whether a convolution of a batch of maps acts on each pixel alone, and these lie together."""
    pointwise = (
        conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    )
    return pointwise and x.dim() == 4 and x.permute(0, 2, 3, 1).is_contiguous() and not traced()


def linear(conv: _ConvNd, x: Tensor) -> Tensor:
    """``conv(x)`` of a 1x1 convolution, in channels_last."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
