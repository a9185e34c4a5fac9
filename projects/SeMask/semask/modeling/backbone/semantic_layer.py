"""The semantic layer of SeMask (arXiv 2112.12782, section 3.2).

It stands behind the blocks of any hierarchical transformer's stage and knows nothing of it:
token maps (B, H, W, C) in, token maps and semantic-prior maps out.
"""

import torch
from torch import Tensor, nn

from .window import merge_windows, pad_to_multiple, split_windows


class SemanticAttention(nn.Module):
    """Attention whose queries and keys are class logits: tokens of a class look at each other.

    The queries are at the same time the prediction that the prior's loss supervises.
    """

    def __init__(self, *, dim: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.query = nn.Linear(dim, num_classes)
        self.key = nn.Linear(dim, num_classes)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        # The paper's lambda. At 0 the model starts as the plain backbone.
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mask the features with their semantic similarity.

        Args:
            x: (groups, tokens, C); a group is a window or a whole map.

        Returns:
            The features (groups, tokens, C) and the semantic query (groups, tokens, K).
        """
        query = self.query(x)
        similarity = query @ self.key(x).transpose(-2, -1)  # no scaling, no heads
        update = self.proj(similarity.softmax(dim=-1) @ self.value(x))
        return self.gamma * self.dropout(update) + x, query


class SemanticLayer(nn.Module):
    """Normalise, then one or more chained semantic attention blocks, in windows or globally.

    Args:
        dim: channels C of the stage.
        num_classes: classes K of the semantic-prior map.
        window_size: side of the (never shifted) windows in tokens; None = attend globally.
        num_blocks: chained attention blocks, at least 1; the last one's query is the prior.
        dropout: rate at the end of each block.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_classes: int,
        window_size: int | None,
        num_blocks: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"A semantic layer needs at least one block, got {num_blocks}")
        if num_classes < 1:
            raise ValueError(f"A semantic layer needs at least one class, got {num_classes}")
        self.window_size = window_size
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(
            SemanticAttention(dim=dim, num_classes=num_classes, dropout=dropout)
            for _ in range(num_blocks)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and prior of a stage.

        Args:
            x: (B, H, W, C).

        Returns:
            Masked features (B, H, W, C) and prior logits (B, H, W, K).
        """
        x = self.norm(x)
        height, width = x.shape[1:3]
        size = self.window_size
        if size is not None:
            x = pad_to_multiple(x, size)  # padded tokens take part, as published
        padded_height, padded_width = x.shape[1:3]
        groups = x.flatten(1, 2) if size is None else split_windows(x, size)
        for block in self.blocks:
            groups, prior = block(groups)
        if size is None:
            return groups.unflatten(1, (height, width)), prior.unflatten(1, (height, width))
        x = merge_windows(groups, size, padded_height, padded_width)
        prior = merge_windows(prior, size, padded_height, padded_width)
        return x[:, :height, :width], prior[:, :height, :width]
