"""The semantic layer of SeMask (arXiv 2112.12782, section 3.2).

It stands behind the blocks of any hierarchical transformer's stage and knows nothing of it:
token maps (B, H, W, C) in, token maps and semantic-prior maps out.
"""

import torch
from torch import Tensor, nn

from .window import from_windows, to_windows


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

    def forward(self, x: Tensor, return_prior: bool = True) -> tuple[Tensor, Tensor | None]:
        """Features and prior of a stage.

        Args:
            x: (B, H, W, C).
            return_prior: False = the prior is not brought into the map's order.

        Returns:
            Masked features (B, H, W, C), and prior logits (B, H, W, K) or None.
        """
        x = self.norm(x)
        batch, height, width, _ = x.shape
        shape = (batch, height, width)
        size = self.window_size
        # Padded tokens take part, as published.
        groups = x.flatten(1, 2) if size is None else to_windows(x, size)
        for block in self.blocks:
            groups, prior = block(groups)
        maps = [groups, prior] if return_prior else [groups]
        if size is None:
            maps = [each.view(*shape, -1) for each in maps]
        else:
            maps = [from_windows(each, shape, size) for each in maps]
        return maps[0], maps[1] if return_prior else None
