"""The semantic layer of SeMask (arXiv 2112.12782, section 3.2).

It stands behind the blocks of any hierarchical transformer's stage and knows nothing of it:
token maps (B, H, W, C) in, token maps and semantic-prior maps out.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semask.ops.prepared import Prepared
from semask.ops.tracing import evaluated, traced, trained
from semask.ops.window import (
    WindowLayout,
    append_zero,
    gather_windows,
    scatter_windows,
    window_layout,
    window_parts,
)

# Without gradients, the similarities of as many queries as fit are held at a time, and as many
# attention weights.
SIMILARITY_BYTES = 64 * 2**20


class SemanticAttention(nn.Module):
    """Attention whose queries and keys are class logits: tokens of a class look at each other.

    The queries are at the same time the prediction that the prior's loss supervises.

    Args:
        dim: channels C.
        num_classes: K.
        dropout: rate at the end.
        folded: evaluate with products of the matrices instead of the matrices.
    """

    def __init__(
        self, *, dim: int, num_classes: int, dropout: float = 0.1, folded: bool = False
    ) -> None:
        super().__init__()
        self.query = nn.Linear(dim, num_classes)
        self.key = nn.Linear(dim, num_classes)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        # The paper's lambda. At 0 the model starts as the plain backbone.
        self.gamma = nn.Parameter(torch.zeros(1))
        self.folded = folded
        self._update: Prepared[tuple[Tensor, Tensor]] = Prepared()
        self._similarity: Prepared[tuple[Tensor, Tensor]] = Prepared()

    def train(self, mode: bool = True) -> "SemanticAttention":
        self._update.clear()
        self._similarity.clear()
        super().train(mode)
        return self

    def forward(self, x: Tensor, return_query: bool = True) -> tuple[Tensor, Tensor | None]:
        """Mask the features with their semantic similarity.

        Args:
            x: (groups, tokens, C); a group is a window or a whole map.
            return_query: False = the query is not asked for, and may not even be computed.

        Returns:
            The features (groups, tokens, C), and the semantic query (groups, tokens, K) or None.
        """
        if self.folded and evaluated(self):
            return self._evaluate(x, return_query)
        query, key, value = self.query(x), self.key(x), self.value(x)
        update = self.proj(_attend(query, key, value))
        return self.gamma * self.dropout(update) + x, query if return_query else None

    def _evaluate(self, x: Tensor, return_query: bool) -> tuple[Tensor, Tensor | None]:
        """The same with fewer products.

        The attention weights A of a token sum to 1, so gamma * proj(A value(x)) = A (x M) + b.
        And query . key' = x N x' + n x' + something that is the same for all keys x', which a
        softmax does not see; N is smaller than query and key where C < 2 K.
        """
        matrix, bias = self._update.get(
            _fold_update, *self.value.parameters(), *self.proj.parameters(), self.gamma
        )
        query = None
        if return_query or x.shape[-1] > self.key.out_features:
            query, key = self.query(x), self.key(x)
            update = _attend(query, key, x @ matrix)
        else:
            weight, offset = self._similarity.get(
                _fold_similarity, self.query.weight, self.query.bias, self.key.weight
            )
            update = _attend(torch.addmm(offset, x.flatten(0, 1), weight).view_as(x), x, x @ matrix)
        return update.add_(bias).add_(x), query if return_query else None


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T) value, without scaling and without heads."""
    groups, tokens, _ = query.shape
    step = max(1, SIMILARITY_BYTES // (groups * tokens * query.element_size()))
    # With gradients, all similarities are kept for them anyway.
    if step >= tokens or torch.is_grad_enabled() or traced():
        return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    key = key.to(query.dtype)  # results that are given do not follow mixed precision
    # Each query has its own softmax, so they may be taken a part at a time, in the same memory:
    # blocks of this size that come and go leave holes that nothing fits into.
    similarity, weights = query.new_empty(2, groups * step * tokens)
    out = torch.empty_like(value)
    for part, result in zip(query.split(step, dim=1), out.split(step, dim=1), strict=True):
        shape = groups, part.shape[1], tokens
        here = [buffer[: math.prod(shape)].view(shape) for buffer in (similarity, weights)]
        torch.bmm(part, key.transpose(-2, -1), out=here[0])
        torch.softmax(here[0], dim=-1, out=here[1])
        result.copy_(here[1] @ value)
    return out


def _fold_update(
    value: Tensor, value_bias: Tensor, proj: Tensor, proj_bias: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """M (C, C) and b (C,) of :meth:`SemanticAttention._evaluate`."""
    return gamma * (proj @ value).T, gamma * (proj @ value_bias + proj_bias)


def _fold_similarity(query: Tensor, query_bias: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """N (C, C) and n (C,) of :meth:`SemanticAttention._evaluate`."""
    return query.T @ key, query_bias @ key


class SemanticLayer(nn.Module):
    """Normalise, then one or more chained semantic attention blocks, in windows or globally.

    Args:
        dim: channels C of the stage.
        num_classes: classes K of the semantic-prior map.
        window_size: side of the (never shifted) windows in tokens; None = attend globally.
        num_blocks: chained attention blocks, at least 1; the last one's query is the prior.
        dropout: rate at the end of each block.
        folded: see :class:`SemanticAttention`.
        chunked: without gradients, take a few windows at a time through all blocks.
        recomputed: in training keep nothing but the input, and make the rest again.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_classes: int,
        window_size: int | None,
        num_blocks: int = 1,
        dropout: float = 0.1,
        folded: bool = False,
        chunked: bool = False,
        recomputed: bool = False,
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"A semantic layer needs at least one block, got {num_blocks}")
        if num_classes < 1:
            raise ValueError(f"A semantic layer needs at least one class, got {num_classes}")
        self.window_size = window_size
        self.chunked = chunked
        self.recomputed = recomputed
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(
            SemanticAttention(dim=dim, num_classes=num_classes, dropout=dropout, folded=folded)
            for _ in range(num_blocks)
        )

    def forward(self, x: Tensor, return_prior: bool = True) -> tuple[Tensor, Tensor | None]:
        """Features and prior of a stage.

        Args:
            x: (B, H, W, C).
            return_prior: False = the prior is not asked for.

        Returns:
            Masked features (B, H, W, C), and prior logits (B, H, W, K) or None.
        """
        if self.recomputed and trained(self):
            return checkpoint(self._forward, x, return_prior, use_reentrant=False)
        return self._forward(x, return_prior)

    def _forward(self, x: Tensor, return_prior: bool) -> tuple[Tensor, Tensor | None]:
        batch, height, width, _ = x.shape
        if self.window_size is None:
            features, prior = self._through_blocks(self.norm(x).flatten(1, 2), return_prior)
            return _as_maps(x.shape, features, prior)
        layout = window_layout(batch, height, width, self.window_size, 0, x.device)
        if self.chunked and evaluated(self):
            features, prior = self._evaluate(x.flatten(0, 2), layout, return_prior)
        else:  # padded tokens take part, as published
            windows = gather_windows(append_zero(self.norm(x).flatten(0, 2)), layout)
            features, prior = self._through_blocks(windows, return_prior)
            features = scatter_windows(features, layout)
            prior = None if prior is None else scatter_windows(prior, layout)
        return _as_maps(x.shape, features, prior)

    def _through_blocks(self, groups: Tensor, return_prior: bool) -> tuple[Tensor, Tensor | None]:
        prior = None
        for block in self.blocks:
            groups, prior = block(groups, return_prior)
        return groups, prior

    def _evaluate(
        self, tokens: Tensor, layout: WindowLayout, return_prior: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The same a few windows at a time: they do not see each other."""
        out = prior = None
        for part in window_parts(layout):
            windows = gather_windows(append_zero(self.norm(part.take(tokens))), part)
            windows, query = self._through_blocks(windows, return_prior)
            if out is None:  # the first ones tell the type
                out = windows.new_empty(len(tokens), windows.shape[2])
                prior = None if query is None else query.new_empty(len(tokens), query.shape[2])
            part.put(scatter_windows(windows, part), out)
            if query is not None and prior is not None:
                part.put(scatter_windows(query, part), prior)
        assert out is not None  # a map has a token
        return out, prior


def _as_maps(
    shape: torch.Size, features: Tensor, prior: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Tokens of maps (B, H, W, C) as maps."""
    return features.view(shape), None if prior is None else prior.view(*shape[:3], -1)
