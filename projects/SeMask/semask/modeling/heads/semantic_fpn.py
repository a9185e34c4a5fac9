"""The Semantic-FPN decoder (arXiv 1901.02446, section 3 and figure 3)."""

import math
from collections.abc import Mapping

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from ..conv3x3 import Conv3x3
from ..resize import double, resize


class SemanticFPNHead(nn.Module):
    """Bring each stage to stride 4 with convolutions and x2 up-sampling, sum, classify.

    Args:
        input_shape: channels and stride of each input feature, by name.
        num_classes: K.
        conv_dims: channels of the decoder.
        common_stride: stride of the output; also the stride of the finest input.
        dropout: rate at which whole channels are dropped before the classifier.
        norm: name of the normalisation, as ``detectron2.layers.get_norm`` takes it.
        winograd: how the convolutions are computed, see :class:`Conv3x3`.

    Raises:
        ValueError: no input feature has the common stride, or a number is not positive.
    """

    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        num_classes: int,
        conv_dims: int = 256,
        common_stride: int = 4,
        dropout: float = 0.1,
        norm: str = "SyncBN",
        winograd: bool = False,
    ) -> None:
        super().__init__()
        for key, value in (("NUM_CLASSES", num_classes), ("CONVS_DIM", conv_dims)):
            if value < 1:
                raise ValueError(f"MODEL.SEM_SEG_HEAD.{key} must be at least 1, got {value}")
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride)
        if not shapes or shapes[0][1].stride != common_stride:
            raise ValueError(
                f"The Semantic-FPN head sums its maps at stride {common_stride} and needs a "
                f"feature of that stride; it got {[(k, shape.stride) for k, shape in shapes]} "
                "(MODEL.SEM_SEG_HEAD.IN_FEATURES, MODEL.SEM_SEG_HEAD.COMMON_STRIDE)"
            )
        self.in_features = [name for name, _ in shapes]
        self.common_stride = common_stride
        self._finest = {name for name, shape in shapes if shape.stride == common_stride}
        self.scale_heads = nn.ModuleDict(
            {
                name: self._scale_head(shape.channels, shape.stride, conv_dims, norm, winograd)
                for name, shape in shapes
            }
        )
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)
        self.to(memory_format=torch.channels_last)

    def _scale_head(
        self, channels: int, stride: int, conv_dims: int, norm: str, winograd: bool
    ) -> nn.Sequential:
        doublings = int(math.log2(stride / self.common_stride))
        layers: list[nn.Module] = []
        for step in range(max(1, doublings)):
            conv = Conv3x3(
                channels,
                conv_dims,
                norm=get_norm(norm, conv_dims),
                activation=F.relu_,  # nobody needs what it replaces
                winograd=winograd,
            )
            weight_init.c2_msra_fill(conv)
            layers.append(conv)
            if step + 1 < doublings:  # the last doubling is left to forward
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            channels = conv_dims
        return nn.Sequential(*layers)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Class logits at the common stride.

        Args:
            features: {name: (B, C, ceil(H / stride), ceil(W / stride))}.

        Returns:
            (B, K, ceil(H / 4), ceil(W / 4)) for a common stride of 4.
        """
        finest: Tensor | None = None
        # Up-sampling is linear: branches whose last doubling starts at the same size are summed
        # in front of it, not behind.
        coarser: dict[torch.Size, Tensor] = {}
        for name, head in self.scale_heads.items():
            branch = head(features[name])
            if name in self._finest:
                finest = branch if finest is None else finest + branch
            else:
                same = coarser.get(branch.shape)
                coarser[branch.shape] = branch if same is None else same + branch
        assert finest is not None  # __init__ has seen to it
        for branch in coarser.values():
            branch = resize(double(branch), finest.shape[-2:])
            # In training, what is summed is kept for the gradient of its activation.
            finest = finest + branch if torch.is_grad_enabled() else finest.add_(branch)
        return self.predictor(self.dropout(finest))
