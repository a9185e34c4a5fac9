"""Mask2Former's pixel decoder: multi-scale deformable attention (arXiv 2112.01527, section 3.2.1).

It is computed in float32 under autocast, too.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.layers.deformable_attention import (
    MultiScaleDeformableAttention,
    Size,
    reference_points,
)
from semask.modeling.layers.position_encoding import sine_position_encoding
from semask.modeling.layers.resize import resize
from semask.modeling.pixel_decoder.base import PixelDecoder, lateral_conv, mask_conv, output_conv
from semask.utils.precision import autocast_off


class EncoderLayer(nn.Module):
    """Deformable self-attention over the tokens of all maps, then two linear layers.

    Args:
        channels: C.
        hidden_channels: between the linear layers.
        dropout: rate after the attention and after each linear layer.
        num_levels, num_heads, num_points: see :class:`MultiScaleDeformableAttention`.
    """

    def __init__(
        self,
        *,
        channels: int,
        hidden_channels: int,
        dropout: float,
        num_levels: int,
        num_heads: int,
        num_points: int,
    ) -> None:
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(
            channels=channels, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, hidden_channels)
        self.linear2 = nn.Linear(hidden_channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, position: Tensor, points: Tensor, sizes: Sequence[Size]) -> Tensor:
        """
        Args:
            x: (B, S, C), the tokens of all maps.
            position: (S, C), added to the queries only.
            points: (S, 2), the position of each token as fractions of its map.
            sizes: of the maps.

        Returns:
            (B, S, C).
        """
        x = self.norm1(x + self.dropout(self.self_attn(x + position, points, x, sizes)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class Encoder(nn.Module):
    """Layers in a row.

    Args:
        layers: in their order.
    """

    def __init__(self, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, position: Tensor, points: Tensor, sizes: Sequence[Size]) -> Tensor:
        """See :meth:`EncoderLayer.forward`."""
        for layer in self.layers:
            x = layer(x, position, points, sizes)
        return x


class DeformableTransformer(nn.Module):
    """Exchange information within and between maps of several resolutions.

    Args:
        channels: C of the maps.
        num_levels: L, the number of maps.
        encoder: the layers.
    """

    def __init__(self, *, channels: int, num_levels: int, encoder: Encoder) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(num_levels, channels))
        nn.init.normal_(self.level_embed)
        self.encoder = encoder

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """L maps (B, C, H_l, W_l) to the same shapes."""
        sizes = [(each.shape[-2], each.shape[-1]) for each in maps]
        tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1)
        return self.encode(tokens, sizes)

    def encode(self, tokens: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """As :meth:`forward`.

        Args:
            tokens: (B, S, C), of all maps, one map after the other, each in rows.
            sizes: of the maps.
        """
        positions = [
            sine_position_encoding(size, tokens.shape[-1], tokens.device)[0].flatten(1).t()
            + embedding
            for size, embedding in zip(sizes, self.level_embed, strict=True)
        ]
        points = reference_points(sizes, tokens.dtype, tokens.device)
        position = torch.cat(positions).to(tokens.dtype)
        encoded = self.encoder(tokens, position, points, sizes).transpose(1, 2)
        levels = encoded.split([height * width for height, width in sizes], dim=-1)
        return [level.unflatten(-1, size) for level, size in zip(levels, sizes, strict=True)]


class DeformablePixelDecoder(PixelDecoder):
    """A deformable transformer over strides 32, 16 and 8; stride 4 is added as in a pyramid."""

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
    ) -> None:
        """
        Args:
            input_shape, channels, mask_channels, norm: see :class:`PixelDecoder`; ``norm`` is that
                of stride 4 only; the projections in front of the transformer have GroupNorm.
            num_layers: of the transformer.
            num_heads, num_points: of its attention.
            hidden_channels: between its linear layers.
            dropout: of the transformer.

        Raises:
            ConfigError: as :class:`PixelDecoder`; or there is no layer, or a number of channels
                cannot be divided by the heads or by 4.
        """
        super().__init__(
            input_shape=input_shape, channels=channels, mask_channels=mask_channels, norm=norm
        )
        if num_layers < 1:
            raise ConfigError(
                "The deformable pixel decoder needs at least 1 layer, but "
                f"MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS is {num_layers}."
            )
        if channels % 32:
            raise ConfigError(
                "MODEL.SEM_SEG_HEAD.CONVS_DIM must be a multiple of the 32 groups that the "
                f"transformer's input is normalised in, got {channels}."
            )
        finest, *coarser = [input_shape[name].channels for name in self.in_features]
        self.input_proj = nn.ModuleList(_projection(width, channels) for width in coarser[::-1])
        layers = [
            EncoderLayer(
                channels=channels,
                hidden_channels=hidden_channels,
                dropout=dropout,
                num_levels=len(coarser),
                num_heads=num_heads,
                num_points=num_points,
            )
            for _ in range(num_layers)
        ]
        self.transformer = DeformableTransformer(
            channels=channels, num_levels=len(coarser), encoder=Encoder(layers)
        )
        self.mask_features = mask_conv(channels, mask_channels, kernel_size=1)
        self.adapter_1 = lateral_conv(finest, channels, norm)
        self.layer_1 = output_conv(channels, channels, norm)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`PixelDecoder.forward`."""
        own_type = self.transformer.level_embed.dtype
        finest, *coarser = [feature.to(own_type) for feature in self.pick(features)]
        with autocast_off(finest.device):
            projected = [
                project(feature)
                for project, feature in zip(self.input_proj, coarser[::-1], strict=True)
            ]
            maps = self.transformer(projected)
            lateral = self.adapter_1(finest)
            fused = self.fuse(lateral, resize(maps[-1], lateral.shape[-2:]))
            return self.mask_features(self.layer_1(fused)), maps

    def fuse(self, lateral: Tensor, coarser: Tensor) -> Tensor:
        """Combine the finest feature and the next coarser map.

        Args:
            lateral: (B, C, H, W), from the finest feature.
            coarser: (B, C, H, W), up-sampled.

        Returns:
            (B, C, H, W).
        """
        return lateral + coarser


def _projection(in_channels: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel_size=1)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(32, channels))
