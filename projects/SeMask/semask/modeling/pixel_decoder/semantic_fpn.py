"""The Semantic-FPN decoder (arXiv 1901.02446, section 3 and figure 3)."""

import math
from collections.abc import Mapping

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from semask.modeling.layers.resize import double, resize
from semask.ops.conv3x3 import Conv3x3
from semask.ops.stripes import MapRows, resized
from semask.ops.tracing import evaluated

# Bytes of the finest map that evaluation makes at a time.
BAND_BYTES = 32 * 2**20


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
        chunked: without gradients, make the finest maps a few rows at a time.

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
        chunked: bool = False,
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
        self.chunked = chunked
        self._finest_in = [name for name, shape in shapes if shape.stride == common_stride]
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
        coarser = self._coarser(features)
        if self.chunked and evaluated(self) and self._is_local():
            return self._evaluate(features, coarser)
        finest = self._finest(features)
        for branch in coarser:
            branch = resize(double(branch), finest.shape[-2:])
            finest = _sum(finest, branch)
        return self.predictor(self.dropout(finest))

    def _is_local(self) -> bool:
        """Whether a band of the finest map can be made by itself."""
        branches = [self.scale_heads[name] for name in self._finest_in]
        convolutions = [
            layer for branch in branches for layer in branch.modules() if isinstance(layer, Conv3x3)
        ]
        return all(map(Conv3x3.is_local, convolutions)) and not self.dropout.training

    def _finest(self, features: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """The sum of the branches that start at the common stride; ``rows`` alone are read."""
        branches = [self.scale_heads[name](features[name][:, :, rows]) for name in self._finest_in]
        return sum(branches[1:], branches[0])

    def _coarser(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The other branches, before their last doubling.

        Up-sampling is linear: those whose last doubling starts at the same size are summed in
        front of it, not behind.
        """
        sums: dict[torch.Size, Tensor] = {}
        for name, head in self.scale_heads.items():
            if name not in self._finest_in:
                branch = head(features[name])
                same = sums.get(branch.shape)
                sums[branch.shape] = branch if same is None else _sum(same, branch)
        return list(sums.values())

    def _evaluate(self, features: Mapping[str, Tensor], coarser: list[Tensor]) -> Tensor:
        """The same in bands of rows, for each of which one more on either side is convolved."""
        finest = features[self._finest_in[0]]
        batch, _, height, width = finest.shape
        row_bytes = width * self.predictor.in_channels * finest.element_size()
        step = max(1, BAND_BYTES // row_bytes)
        logits: Tensor | None = None
        for image in range(batch):
            one = {name: features[name][image : image + 1] for name in self._finest_in}
            doubled = [
                resized(MapRows(x[image]), (2 * x.shape[2], 2 * x.shape[3]), (height, width))
                for x in coarser
            ]
            for start in range(0, height, step):
                rows = slice(start, min(start + step, height))
                above = min(start, 1)
                band = self._finest(one, slice(start - above, rows.stop + 1))
                band = band[:, :, above : above + rows.stop - start]
                for branch in doubled:
                    band += branch[rows].permute(2, 0, 1)
                part = self.predictor(self.dropout(band))
                if logits is None:
                    logits = part.new_empty(batch, height, width, part.shape[1])
                logits[image, rows] = part[0].permute(1, 2, 0)
        assert logits is not None  # a map has a row
        return logits.permute(0, 3, 1, 2)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b, in the memory of ``a`` where it is not kept for the gradient of its activation."""
    return a + b if torch.is_grad_enabled() else a.add_(b)
