"""Faster forms of the semantic layer and of its attention."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from semask.modeling.backbone.semantic_layer import SemanticAttention, SemanticLayer
from semask.ops.modes import ParameterCache, is_inference, is_tracing, is_training
from semask.ops.products import linear
from semask.ops.window import (
    append_zero,
    gather_windows,
    scatter_windows,
    window_layout,
    window_parts,
)

# The similarities of as many queries as fit are held at a time, and as many attention weights.
SIMILARITY_BYTES = 64 * 2**20


class SplitSemanticAttention(SemanticAttention):
    """A :class:`SemanticAttention` that, without gradients, computes a few queries at a time."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See :meth:`SemanticAttention.attend`."""
        groups, tokens, _ = query.shape
        step = max(1, SIMILARITY_BYTES // (groups * tokens * query.element_size()))
        # With gradients, all similarities are kept anyway.
        if step >= tokens or torch.is_grad_enabled() or is_tracing():
            return super().attend(query, key, value)
        key = key.to(query.dtype)  # `out=` bypasses autocast
        # Reuse two buffers: repeated allocation fragments the heap.
        similarity, weights = query.new_empty(2, groups * step * tokens)
        out = torch.empty_like(value)
        for part, result in zip(query.split(step, dim=1), out.split(step, dim=1), strict=True):
            shape = groups, part.shape[1], tokens
            here = [buffer[: math.prod(shape)].view(shape) for buffer in (similarity, weights)]
            torch.bmm(part, key.transpose(-2, -1), out=here[0])
            torch.softmax(here[0], dim=-1, out=here[1])
            result.copy_(here[1] @ value)
        return out


class FoldedSemanticAttention(SemanticAttention):
    """A :class:`SemanticAttention` evaluated with precomputed products of its matrices.

    The attention weights A of a token sum to 1, so gamma * proj(A value(x)) = A (x M) + b.
    And query . key' = x N x' + n x' + a term that is the same for all keys x', to which a softmax
    is invariant. N (C x C) replaces the matrices of query and key (C x K each) where the prior is
    not asked for and C <= K: each similarity then has C terms instead of K. Between K and 2 K the
    products with the matrices alone would be cheaper, but every similarity would cost more.
    """

    _update: ParameterCache[tuple[Tensor, Tensor]]
    _similarity: ParameterCache[tuple[Tensor, Tensor]]

    def set_up(self) -> None:
        """Create the caches of M and b, and of N and n."""
        self._update = ParameterCache()
        self._similarity = ParameterCache()

    def train(self, mode: bool = True) -> "FoldedSemanticAttention":
        """Also forget the products: parameters may have been changed through ``.data``."""
        self._update.clear()
        self._similarity.clear()
        super().train(mode)
        return self

    def forward(self, x: Tensor, return_query: bool = True) -> tuple[Tensor, Tensor | None]:
        """See :meth:`SemanticAttention.forward`."""
        # In mixed precision the products would be rounded, and the plain form's factors are not.
        if not is_inference(self) or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, return_query)
        matrix, bias = self._update.get(
            _fold_update, *self.value.parameters(), *self.proj.parameters(), self.gamma
        )
        query = None
        if return_query or x.shape[-1] > self.key.out_features:
            query, key = self.query(x), self.key(x)
            update = self.attend(query, key, linear(x, matrix.T))
        else:
            weight, offset = self._similarity.get(
                _fold_similarity, self.query.weight, self.query.bias, self.key.weight
            )
            folded = linear(x, weight.T, offset)
            update = self.attend(folded, x, linear(x, matrix.T))
        return update.add_(bias).add_(x), query if return_query else None


def _fold_update(
    value: Tensor, value_bias: Tensor, proj: Tensor, proj_bias: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """M (C, C) and b (C,) of :class:`FoldedSemanticAttention`."""
    return gamma * (proj @ value).T, gamma * (proj @ value_bias + proj_bias)


def _fold_similarity(query: Tensor, query_bias: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """N (C, C) and n (C,) of :class:`FoldedSemanticAttention`."""
    return query.T @ key, query_bias @ key


class GatheredSemanticLayer(SemanticLayer):
    """A :class:`SemanticLayer` whose windows are cut by one gather."""

    def mask(self, x: Tensor, return_prior: bool) -> tuple[Tensor, Tensor | None]:
        """See :meth:`SemanticLayer.mask`."""
        if self.window_size is None:
            return super().mask(x, return_prior)
        batch, height, width, _ = x.shape
        layout = window_layout(batch, height, width, self.window_size, 0, x.device)
        windows = gather_windows(append_zero(x.flatten(0, 2)), layout)
        windows, prior = self.through_blocks(windows, return_prior)
        features = scatter_windows(windows, layout)
        return _as_maps(x, features, None if prior is None else scatter_windows(prior, layout))


class ChunkedSemanticLayer(SemanticLayer):
    """A :class:`SemanticLayer` that is evaluated a few windows at a time."""

    def forward(self, x: Tensor, return_prior: bool = True) -> tuple[Tensor, Tensor | None]:
        """See :meth:`SemanticLayer.forward`."""
        if self.window_size is None or not is_inference(self):
            return super().forward(x, return_prior)
        batch, height, width, _ = x.shape
        layout = window_layout(batch, height, width, self.window_size, 0, x.device)
        tokens = x.flatten(0, 2)
        out = prior = None
        for part in window_parts(layout):
            taken = part.take(tokens)
            normed = self.norm(taken)
            windows, query = self.through_blocks(
                gather_windows(append_zero(normed), part), return_prior
            )
            features = self.join(taken, normed, scatter_windows(windows, part))
            if out is None:  # the first part sets the dtype
                out = features.new_empty(len(tokens), features.shape[1])
                prior = None if query is None else query.new_empty(len(tokens), query.shape[2])
            part.put(features, out)
            if query is not None and prior is not None:
                part.put(scatter_windows(query, part), prior)
        assert out is not None  # a map has at least one token
        return _as_maps(x, out, prior)


class RecomputedSemanticLayer(SemanticLayer):
    """A windowed :class:`SemanticLayer` that keeps only its input for the gradient."""

    def forward(self, x: Tensor, return_prior: bool = True) -> tuple[Tensor, Tensor | None]:
        """See :meth:`SemanticLayer.forward`."""
        if self.window_size is None or not is_training(self):
            return super().forward(x, return_prior)
        features, prior = checkpoint(super().forward, x, return_prior, use_reentrant=False)
        return features, prior


def _as_maps(like: Tensor, features: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens as maps (B, H, W, C) of the size of ``like``."""
    return features.view(like.shape), None if prior is None else prior.view(*like.shape[:3], -1)
