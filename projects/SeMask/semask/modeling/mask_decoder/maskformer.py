"""MaskFormer's transformer decoder, that of DETR (arXiv 2107.06278, section 3.3)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from semask.modeling.layers.position_encoding import sine_position_encoding
from semask.modeling.mask_decoder.base import (
    MLP,
    MaskDecoder,
    MaskPrediction,
    mask_logits,
    xavier_uniform,
)


class DetrDecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the image, feed-forward; post-norm.

    Args:
        dim: channels C.
        num_heads: of both attentions; divides C.
        feedforward_dim: hidden width of the feed-forward part.
        dropout: rate of attention weights, hidden values and every residual branch.
    """

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor
    ) -> Tensor:
        """
        Args:
            x, query_position: (B, Q, C).
            memory: (B, N, C).
            position: (1, N, C), added to the keys.

        Returns:
            (B, Q, C).
        """
        query = x + query_position
        attended, _ = self.self_attn(query, query, x, need_weights=False)
        x = self.norm1(x + self.dropout(attended))
        attended, _ = self.multihead_attn(
            x + query_position, memory + position, memory, need_weights=False
        )
        x = self.norm2(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(hidden)))


class DetrDecoder(nn.Module):
    """A stack of layers; one norm for the outputs of all of them.

    Args:
        num_layers: how many.
        dim, num_heads, feedforward_dim, dropout: see :class:`DetrDecoderLayer`.
    """

    def __init__(
        self, num_layers: int, dim: int, num_heads: int, feedforward_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DetrDecoderLayer(dim, num_heads, feedforward_dim, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, query_position: Tensor, memory: Tensor, position: Tensor) -> list[Tensor]:
        """(B, Q, C), (B, N, C) and (1, N, C) to (B, Q, C) for each layer."""
        x = query_position.new_zeros(query_position.shape)
        outputs = []
        for layer in self.layers:
            x = layer(x, query_position, memory, position)
            outputs.append(self.norm(x))
        return outputs


class MaskFormerDecoder(MaskDecoder):
    """Queries attend to one map of low resolution, everywhere."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_queries: int = 100,
        num_layers: int = 6,
        dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        mask_dim: int = 256,
        dropout: float = 0.1,
    ) -> None:
        """
        Args:
            in_channels: of the map.
            num_classes, num_queries, dim, num_heads: see :class:`MaskDecoder`.
            num_layers: decoder layers, each with a prediction; at least 1.
            feedforward_dim: hidden width of the feed-forward layers.
            mask_dim: channels of the mask features.
            dropout: of attention weights, hidden values and every residual branch.
        """
        super().__init__(
            num_classes=num_classes,
            num_queries=num_queries,
            num_predictions=num_layers,
            dim=dim,
            num_heads=num_heads,
        )
        decoder = DetrDecoder(num_layers, dim, num_heads, feedforward_dim, dropout)
        xavier_uniform(decoder)
        self.transformer = nn.ModuleDict({"decoder": decoder})
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(in_channels, dim, 1)
        nn.init.kaiming_uniform_(self.input_proj.weight, a=1)
        assert self.input_proj.bias is not None
        nn.init.zeros_(self.input_proj.bias)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = MLP(dim, dim, dim, mask_dim)

    def forward(
        self, maps: Sequence[Tensor], mask_features: Tensor, return_aux: bool | None = None
    ) -> list[MaskPrediction]:
        """See :meth:`MaskDecoder.forward`; ``maps`` is a single map (B, in_channels, h, w)."""
        if return_aux is None:
            return_aux = self.training
        (image,) = maps
        memory = self.input_proj(image)
        position = sine_position_encoding(memory.shape[-2:], memory.shape[1], memory.device)
        outputs = self.transformer["decoder"](
            self.query_embed.weight.expand(memory.shape[0], -1, -1),
            memory.flatten(2).transpose(1, 2),
            position.flatten(2).transpose(1, 2),
        )
        return [
            MaskPrediction(self.class_embed(x), mask_logits(self.mask_embed(x), mask_features))
            for x in (outputs if return_aux else outputs[-1:])
        ]
