"""The Semantic-FPN decoder (arXiv 1901.02446, section 3 and figure 3)."""

import math
from collections.abc import Mapping

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.layers.resize import resize


class SemanticFPNDecoder(nn.Module):
    """Bring each stage to stride 4 with convolutions and x2 up-sampling, sum, classify."""

    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        num_classes: int,
        conv_dims: int = 256,
        common_stride: int = 4,
        dropout: float = 0.1,
        norm: str = "SyncBN",
    ) -> None:
        """
        Args:
            input_shape: channels and stride of each input feature, by name.
            num_classes: K.
            conv_dims: channels of the decoder.
            common_stride: stride of the output; also the stride of the finest input.
            dropout: rate at which whole channels are dropped before the classifier.
            norm: name of the normalisation, as ``detectron2.layers.get_norm`` takes it.

        Raises:
            ConfigError: no input feature has the common stride, or a number is not positive.
        """
        super().__init__()
        for key, value in (("NUM_CLASSES", num_classes), ("CONVS_DIM", conv_dims)):
            if value < 1:
                raise ConfigError(f"MODEL.SEM_SEG_HEAD.{key} must be at least 1, got {value}.")
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride)
        if not shapes or shapes[0][1].stride != common_stride:
            raise ConfigError(
                f"The Semantic-FPN head sums its maps at stride {common_stride} and needs a "
                f"feature of that stride; it got {[(k, shape.stride) for k, shape in shapes]} "
                "(MODEL.SEM_SEG_HEAD.IN_FEATURES, MODEL.SEM_SEG_HEAD.COMMON_STRIDE)."
            )
        self.in_features = [name for name, _ in shapes]
        self.common_stride = common_stride
        self.scale_heads = nn.ModuleDict()
        for name, shape in shapes:
            doublings = int(math.log2(shape.stride / common_stride))
            self.scale_heads[name] = _scale_head(shape.channels, conv_dims, doublings, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Class logits at the common stride.

        Args:
            features: {name: (B, C, ceil(H / stride), ceil(W / stride))}.

        Returns:
            (B, K, ceil(H / 4), ceil(W / 4)) for a common stride of 4.
        """
        return self.predictor(self.dropout(self.summed(features)))

    def summed(self, features: Mapping[str, Tensor]) -> Tensor:
        """(B, conv_dims, ceil(H / 4), ceil(W / 4)): the sum of all branches."""
        size = features[self.in_features[0]].shape[-2:]
        maps = [resize(head(features[name]), size) for name, head in self.scale_heads.items()]
        return sum(maps[1:], maps[0])


def _scale_head(channels: int, conv_dims: int, doublings: int, norm: str) -> nn.Sequential:
    """A convolution in front of each doubling; at the common stride one, without doubling."""
    layers: list[nn.Module] = []
    for _ in range(max(1, doublings)):
        conv = Conv2d(
            channels,
            conv_dims,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, conv_dims),
            activation=F.relu,
        )
        weight_init.c2_msra_fill(conv)
        layers.append(conv)
        if doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        channels = conv_dims
    return nn.Sequential(*layers)
