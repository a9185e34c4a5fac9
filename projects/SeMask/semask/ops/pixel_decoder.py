"""The deformable pixel decoder with few maps of stride 4 in memory."""

from collections.abc import Mapping

from torch import Tensor

from semask.modeling.layers.precision import autocast_off
from semask.modeling.layers.resize import resize
from semask.modeling.pixel_decoder.deformable import DeformablePixelDecoder
from semask.ops.tracing import evaluated


class LeanDeformablePixelDecoder(DeformablePixelDecoder):
    """In evaluation, two maps of stride 4 at a time."""

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See :class:`DeformablePixelDecoder`."""
        if not evaluated(self):
            return super().forward(features)
        own_type = self.transformer.level_embed.dtype
        finest, *coarser = [feature.to(own_type) for feature in self.pick(features)]
        with autocast_off(finest.device):
            maps = self.transformer(
                [
                    project(feature)
                    for project, feature in zip(self.input_proj, coarser[::-1], strict=True)
                ]
            )
            fused = self.adapter_1(finest)
            fused += resize(maps[-1], fused.shape[-2:])
            fused = self.layer_1(fused)
            return self.mask_features(fused), maps
