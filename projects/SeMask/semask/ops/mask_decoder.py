"""Mask2Former's decoder with each mask computed at the size at which it is used.

Attention masks are thresholded predictions, resized to the map that is attended to. The product
with the mask features and the resizing are both linear: the features are resized once for each
map, not each prediction, and full-size predictions are computed only where they are returned.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from semask.modeling.layers.position_encoding import sine_position_encoding
from semask.modeling.layers.resize import resize
from semask.modeling.mask_decoder.base import MaskPrediction, mask_logits
from semask.modeling.mask_decoder.mask2former import CrossAttentionLayer, Mask2FormerDecoder
from semask.ops.modes import traced


class FactoredPrediction(MaskPrediction):
    """A prediction that also keeps the two factors of its masks.

    Attributes:
        embeddings: (B, Q, C).
        features: (B, C, h, w), shared by all predictions.
    """

    embeddings: Tensor
    features: Tensor

    def __new__(cls, logits: Tensor, embeddings: Tensor, features: Tensor) -> "FactoredPrediction":
        self = super().__new__(cls, logits, mask_logits(embeddings, features))
        self.embeddings, self.features = embeddings, features
        return self


class LevelledMask2FormerDecoder(Mask2FormerDecoder):
    """Attention masks from mask features of the size of the map that is attended to.

    Equal up to rounding, which can flip an entry of a mask whose logit is nearly 0.
    """

    def forward(
        self, maps: Sequence[Tensor], mask_features: Tensor, return_aux: bool | None = None
    ) -> list[MaskPrediction]:
        """See :class:`Mask2FormerDecoder`."""
        if traced():
            return super().forward(maps, mask_features, return_aux)
        if return_aux is None:
            return_aux = self.training
        memories = [
            level.flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(maps, self.level_embed.weight, strict=True)
        ]
        # Shared by the layers that attend to a map.
        keys = [
            memory
            + sine_position_encoding(level.shape[-2:], memory.shape[-1], memory.device)
            .flatten(2)
            .transpose(1, 2)
            for level, memory in zip(maps, memories, strict=True)
        ]
        with torch.no_grad():
            features = [resize(mask_features, level.shape[-2:]) for level in maps]
        batch = mask_features.shape[0]
        x = self.query_feat.weight.expand(batch, -1, -1)
        query_position = self.query_embed.weight.expand(batch, -1, -1)
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        predictions: list[MaskPrediction] = []
        for i, (cross_attention, self_attention, feed_forward) in enumerate(layers):
            level = i % len(maps)
            normed = self.decoder_norm(x)
            embeddings = self.mask_embed(normed)
            if return_aux:
                predictions.append(self._prediction(normed, embeddings, mask_features))
            allowed = attended(embeddings.detach(), features[level])
            assert isinstance(cross_attention, CrossAttentionLayer)  # as built
            x = attend(cross_attention, x, query_position, keys[level], memories[level], allowed)
            x = self_attention(x, query_position)
            x = feed_forward(x)
        normed = self.decoder_norm(x)
        predictions.append(self._prediction(normed, self.mask_embed(normed), mask_features))
        return predictions

    def _prediction(self, x: Tensor, embeddings: Tensor, features: Tensor) -> MaskPrediction:
        return FactoredPrediction(self.class_embed(x), embeddings, features)


def attended(embeddings: Tensor, features: Tensor) -> Tensor:
    """Where queries may attend: the opposite of ``modeling.mask_decoder.attention_mask``.

    Args:
        embeddings: (B, Q, C).
        features: (B, C, H, W), mask features of the map's size.

    Returns:
        (B, 1, Q, H * W) bool, for all heads.
    """
    with torch.no_grad():
        outside = (mask_logits(embeddings, features).sigmoid() < 0.5).flatten(2)
        return (~outside | outside.all(dim=-1, keepdim=True))[:, None]


def attend(
    layer: CrossAttentionLayer,
    x: Tensor,
    query_position: Tensor,
    keys: Tensor,
    memory: Tensor,
    allowed: Tensor,
) -> Tensor:
    """``layer(...)`` with one mask for all heads.

    Args:
        layer: its parameters are used.
        x, query_position: (B, Q, C).
        keys, memory: (B, N, C).
        allowed: (B, 1, Q, N) bool.

    Returns:
        (B, Q, C).
    """
    attention = layer.multihead_attn
    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    query, key, value = (
        F.linear(tokens, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for tokens, weight, bias in zip(
            (x + query_position, keys, memory), weights, biases, strict=True
        )
    )
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return layer.norm(x + attention.out_proj(found.transpose(1, 2).flatten(2)))
