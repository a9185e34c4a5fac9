"""Mask2Former's decoder with each mask computed at the size at which it is used.

Attention masks are thresholded predictions, resized to the map that is attended to. The product
with the mask features and the resizing are both linear: the features are resized once for each
map, not each prediction, and full-size predictions are computed only where they are returned.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from semask.modeling.layers.position_encoding import sine_position_encoding
from semask.modeling.layers.resize import resize
from semask.modeling.mask_decoder.base import MaskPrediction
from semask.modeling.mask_decoder.mask2former import CrossAttentionLayer, Mask2FormerDecoder
from semask.ops.modes import is_tracing
from semask.ops.products import linear, product


class SharedFeatures:
    """Mask features whose gradient is one product, from the masks of all predictions together.

    Product by product it would be a sum of ten maps, each as large as the features.

    Attributes:
        features: (B, C, h, w).
    """

    def __init__(self, features: Tensor) -> None:
        """
        Args:
            features: see the attribute.
        """
        self.features = features
        # Of each image, from one prediction after the other: the gradient of the matched masks
        # (n, h * w) and their embeddings (n, C).
        self._factors: Factors = [[] for _ in features]
        self._handle: Tensor = _Collected.apply(features, self._factors)

    def matched(self, embeddings: Tensor, masks: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """Some masks of a prediction; only they have gradients.

        Args:
            embeddings: (B, Q, C).
            masks: (B, Q, h, w), the product of the embeddings and the features.
            queries: (n_i,) int64 of each image, each query once.

        Returns:
            (sum of the n_i, h, w). It can be differentiated once.
        """
        matched: Tensor = _Matched.apply(
            self._handle, embeddings, self.features.detach(), masks.detach(), queries, self._factors
        )
        return matched


Factors = list[list[tuple[Tensor, Tensor]]]


class _Matched(torch.autograd.Function):
    """The handle makes the features' node wait for the gradients of all predictions."""

    @staticmethod
    def forward(
        ctx: Any,
        handle: Tensor,
        embeddings: Tensor,
        features: Tensor,
        masks: Tensor,
        queries: Sequence[Tensor],
        factors: Factors,
    ) -> Tensor:
        ctx.queries, ctx.factors = queries, factors
        ctx.save_for_backward(embeddings, features)
        return torch.cat([own[chosen] for own, chosen in zip(masks, queries, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, features = ctx.saved_tensors
        by_features, by_embeddings = ctx.needs_input_grad[:2]
        parts = grad.flatten(1).split([len(chosen) for chosen in ctx.queries])
        grad_embeddings = torch.zeros_like(embeddings) if by_embeddings else None
        for image, (part, chosen) in enumerate(zip(parts, ctx.queries, strict=True)):
            if by_features:
                ctx.factors[image].append((part, embeddings[image, chosen]))
            if grad_embeddings is not None:
                grad_embeddings[image, chosen] = product(part, features[image].flatten(1).T)
        return grad.new_zeros(()) if by_features else None, grad_embeddings, None, None, None, None


class _Collected(torch.autograd.Function):
    """Mask features (B, C, h, w) to the handle, a scalar."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factors: Factors) -> Tensor:
        ctx.factors = factors
        ctx.save_for_backward(features)
        return features.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        batch, channels, height, width = features.shape
        pixels = features.new_empty(batch, height * width, channels)
        for own, factors in zip(pixels, ctx.factors, strict=True):
            masks, embeddings = (torch.cat(each) for each in zip(*factors, strict=True))
            own.copy_(product(masks.T, embeddings))
            factors.clear()
        return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2), None


class FactoredPrediction(MaskPrediction):
    """A prediction that also keeps the two factors of its masks.

    Attributes:
        embeddings: (B, Q, C).
        shared: the mask features, of all predictions.
    """

    embeddings: Tensor
    shared: SharedFeatures

    def __new__(
        cls, logits: Tensor, embeddings: Tensor, shared: SharedFeatures
    ) -> "FactoredPrediction":
        self = super().__new__(cls, logits, masks_of(embeddings, shared.features))
        self.embeddings, self.shared = embeddings, shared
        return self


class LevelledMask2FormerDecoder(Mask2FormerDecoder):
    """Attention masks from mask features of the size of the map that is attended to.

    Equal up to rounding, which can flip an entry of a mask whose logit is nearly 0.
    """

    def forward(
        self, maps: Sequence[Tensor], mask_features: Tensor, return_aux: bool | None = None
    ) -> list[MaskPrediction]:
        """See :class:`Mask2FormerDecoder`."""
        if is_tracing():
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
        shared = SharedFeatures(mask_features)
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
                predictions.append(self._prediction(normed, embeddings, shared))
            allowed = attended(embeddings.detach(), features[level])
            assert isinstance(cross_attention, CrossAttentionLayer)  # as built
            x = attend(cross_attention, x, query_position, keys[level], memories[level], allowed)
            x = self_attention(x, query_position)
            x = feed_forward(x)
        normed = self.decoder_norm(x)
        predictions.append(self._prediction(normed, self.mask_embed(normed), shared))
        return predictions

    def _prediction(self, x: Tensor, embeddings: Tensor, shared: SharedFeatures) -> MaskPrediction:
        return FactoredPrediction(self.class_embed(x), embeddings, shared)


def masks_of(embeddings: Tensor, features: Tensor) -> Tensor:
    """``modeling.mask_decoder.mask_logits``, image by image."""
    masks = [
        linear(own, pixels.flatten(1).T) for own, pixels in zip(embeddings, features, strict=True)
    ]
    stacked = masks[0][None] if len(masks) == 1 else torch.stack(masks)
    return stacked.unflatten(2, features.shape[-2:])


def attended(embeddings: Tensor, features: Tensor) -> Tensor:
    """Where queries may attend: the opposite of ``modeling.mask_decoder.attention_mask``.

    Args:
        embeddings: (B, Q, C).
        features: (B, C, H, W), mask features of the map's size.

    Returns:
        (B, 1, Q, H * W) bool, for all heads.
    """
    with torch.no_grad():
        outside = (masks_of(embeddings, features).sigmoid() < 0.5).flatten(2)
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
        linear(tokens, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for tokens, weight, bias in zip(
            (x + query_position, keys, memory), weights, biases, strict=True
        )
    )
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return layer.norm(x + attention.out_proj(found.transpose(1, 2).flatten(2)))
