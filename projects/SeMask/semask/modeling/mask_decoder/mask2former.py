"""Mask2Former's transformer decoder with masked attention (arXiv 2112.01527, section 3.2)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from semask.modeling.layers.position_encoding import sine_position_encoding
from semask.modeling.layers.resize import resize
from semask.modeling.mask_decoder.base import (
    MLP,
    MaskDecoder,
    MaskPrediction,
    mask_logits,
    xavier_uniform,
)


class CrossAttentionLayer(nn.Module):
    """Queries attend to a feature map, each within its mask; post-norm.

    Args:
        dim: channels C.
        num_heads: of the attention; divides C.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor, mask: Tensor
    ) -> Tensor:
        """
        Args:
            x, query_position: (B, Q, C).
            memory: (B, N, C).
            position: (1, N, C), added to the keys.
            mask: (B * heads, Q, N) bool, True where a query may not attend.

        Returns:
            (B, Q, C).
        """
        attended, _ = self.multihead_attn(
            x + query_position, memory + position, memory, attn_mask=mask, need_weights=False
        )
        return self.norm(x + attended)


class SelfAttentionLayer(nn.Module):
    """Queries attend to each other; post-norm.

    Args:
        dim: channels C.
        num_heads: of the attention; divides C.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, query_position: Tensor) -> Tensor:
        """(B, Q, C) twice to (B, Q, C)."""
        query = x + query_position
        attended, _ = self.self_attn(query, query, x, need_weights=False)
        return self.norm(x + attended)


class FeedForwardLayer(nn.Module):
    """Two linear layers with ReLU between them; post-norm.

    Args:
        dim: channels C of input and output.
        hidden_dim: channels between the layers.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, C) to (B, Q, C)."""
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class Mask2FormerDecoder(MaskDecoder):
    """Queries attend to the maps in turn, each within its latest predicted mask."""

    def __init__(
        self,
        *,
        num_classes: int,
        num_queries: int = 100,
        num_layers: int = 9,
        num_levels: int = 3,
        dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        mask_dim: int = 256,
    ) -> None:
        """
        Args:
            num_classes, num_queries, dim, num_heads: see :class:`MaskDecoder`.
            num_layers: decoder layers; the learnt queries give one prediction more.
            num_levels: feature maps; layer i attends to map i mod ``num_levels``.
            feedforward_dim: hidden width of the feed-forward layers.
            mask_dim: channels of the mask features.
        """
        super().__init__(
            num_classes=num_classes,
            num_queries=num_queries,
            num_predictions=num_layers + 1,
            dim=dim,
            num_heads=num_heads,
        )
        self.num_heads = num_heads
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(dim, num_heads) for _ in range(num_layers)
        )
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(dim, num_heads) for _ in range(num_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(dim, feedforward_dim) for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(dim)
        self.query_feat = nn.Embedding(num_queries, dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(num_levels, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = MLP(dim, dim, dim, mask_dim)
        for layers in (
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
        ):
            xavier_uniform(layers)

    def forward(
        self, maps: Sequence[Tensor], mask_features: Tensor, return_aux: bool | None = None
    ) -> list[MaskPrediction]:
        """See :meth:`MaskDecoder.forward`; ``maps`` are ``num_levels``, low resolution first."""
        if return_aux is None:
            return_aux = self.training
        sizes = [level.shape[-2:] for level in maps]
        memories = [
            level.flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(maps, self.level_embed.weight, strict=True)
        ]
        positions = [
            sine_position_encoding(size, memory.shape[-1], memory.device).flatten(2).transpose(1, 2)
            for size, memory in zip(sizes, memories, strict=True)
        ]
        batch = mask_features.shape[0]
        x = self.query_feat.weight.expand(batch, -1, -1)
        query_position = self.query_embed.weight.expand(batch, -1, -1)
        predictions = [self.predict(x, mask_features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (cross_attention, self_attention, feed_forward) in enumerate(layers):
            level = i % len(maps)
            mask = attention_mask(predictions[-1].masks, sizes[level], self.num_heads)
            x = cross_attention(x, query_position, memories[level], positions[level], mask)
            x = self_attention(x, query_position)
            x = feed_forward(x)
            predictions.append(self.predict(x, mask_features))
        return predictions if return_aux else predictions[-1:]

    def predict(self, x: Tensor, mask_features: Tensor) -> MaskPrediction:
        """A class and a mask for each query.

        Args:
            x: (B, Q, C).
            mask_features: (B, C', h, w).
        """
        x = self.decoder_norm(x)
        return MaskPrediction(self.class_embed(x), mask_logits(self.mask_embed(x), mask_features))


def attention_mask(masks: Tensor, size: Sequence[int], num_heads: int) -> Tensor:
    """Where queries may not attend: outside the masks that they have predicted.

    Args:
        masks: (B, Q, h, w) mask logits.
        size: (H, W) of the map that is attended to.
        num_heads: of the attention; they share the mask.

    Returns:
        (B * heads, Q, H * W) bool, True where a query may not attend; without gradient.
    """
    # sigmoid rounds to 0.5 for logits just below 0, and these still attend.
    outside = (resize(masks.detach(), size).sigmoid() < 0.5).flatten(2)
    # A softmax over nothing is NaN: a query with an empty mask attends everywhere.
    outside = outside & ~outside.all(dim=-1, keepdim=True)
    return outside[:, None].expand(-1, num_heads, -1, -1).flatten(0, 1)
