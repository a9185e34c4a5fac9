"""Faster forms of the Semantic-FPN decoder."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from semask.modeling.layers.resize import resize, upsample_2x
from semask.modeling.pixel_decoder.semantic_fpn import SemanticFPNDecoder
from semask.ops.convolutions import is_local
from semask.ops.modes import is_inference
from semask.ops.stripes import MapRows, resized
from semask.utils.symbolic import is_symbolic

# Bytes of the finest map that evaluation computes at a time.
BAND_BYTES = 32 * 2**20


class EarlySumFPN(SemanticFPNDecoder):
    """Sums branches of one size before their last up-sampling, which is linear.

    Parameters are channels-last, as the backbone's maps are.
    """

    def set_up(self) -> None:
        """Called once on each module that becomes one of these."""
        self.to(memory_format=torch.channels_last)
        for layer in self.scale_heads.modules():
            if isinstance(layer, Conv2d) and layer.activation is F.relu:
                layer.activation = F.relu_  # its input is not used again

    def summed(self, features: Mapping[str, Tensor]) -> Tensor:
        """See :class:`SemanticFPNDecoder`."""
        if is_symbolic(*features[self.in_features[0]].shape):
            return super().summed(features)  # which maps are of one size is not known
        coarser = self.coarser(features)
        finest = self.finest(features)
        for branch in coarser:
            finest = _sum(finest, resize(upsample_2x(branch), finest.shape[-2:]))
        return finest

    def finest_branches(self) -> dict[str, nn.Sequential]:
        """The branches that start at the common stride, without up-sampling."""
        return {name: head for name, head in self._branches().items() if len(head) == 1}

    def finest(self, features: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """The sum of the branches that start at the common stride, of these ``rows``."""
        branches = [
            head(features[name][:, :, rows]) for name, head in self.finest_branches().items()
        ]
        return sum(branches[1:], branches[0])

    def coarser(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The other branches before their last up-sampling; those of one size are summed."""
        sums: dict[torch.Size, Tensor] = {}
        for name, head in self._branches().items():
            if len(head) == 1:
                continue
            branch = features[name]
            for layer in list(head)[:-1]:
                branch = layer(branch)
            same = sums.get(branch.shape)
            sums[branch.shape] = branch if same is None else _sum(same, branch)
        return list(sums.values())

    def _branches(self) -> dict[str, nn.Sequential]:
        return {name: cast(nn.Sequential, head) for name, head in self.scale_heads.items()}


class BandedFPN(EarlySumFPN):
    """Evaluates the finest map in bands of rows, with one more row on either side.

    The decoder's map of stride 4 never exists as a whole.
    """

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """See :class:`SemanticFPNDecoder`."""
        if not is_inference(self) or not self._is_local():
            return super().forward(features)
        names = list(self.finest_branches())
        coarser = self.coarser(features)
        finest = features[names[0]]
        batch, _, height, width = finest.shape
        row_bytes = width * self.predictor.in_channels * finest.element_size()
        step = max(1, BAND_BYTES // row_bytes)
        logits: Tensor | None = None
        for image in range(batch):
            one = {name: features[name][image : image + 1] for name in names}
            doubled = [
                resized(MapRows(x[image]), (2 * x.shape[2], 2 * x.shape[3]), (height, width))
                for x in coarser
            ]
            for start in range(0, height, step):
                rows = slice(start, min(start + step, height))
                above = min(start, 1)
                band = self.finest(one, slice(start - above, rows.stop + 1))
                band = band[:, :, above : above + rows.stop - start]
                for branch in doubled:
                    band += branch[rows].permute(2, 0, 1)
                part = self.predictor(self.dropout(band))
                if logits is None:
                    logits = part.new_empty(batch, height, width, part.shape[1])
                logits[image, rows] = part[0].permute(1, 2, 0)
        assert logits is not None  # a map has a row
        return logits.permute(0, 3, 1, 2)

    def _is_local(self) -> bool:
        """Whether a band of the finest map can be computed by itself."""
        convolutions = [
            layer
            for branch in self.finest_branches().values()
            for layer in branch.modules()
            if isinstance(layer, Conv2d)
        ]
        return all(map(is_local, convolutions)) and not self.dropout.training


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b, in place where ``a`` is not needed for a gradient."""
    return a + b if torch.is_grad_enabled() else a.add_(b)
