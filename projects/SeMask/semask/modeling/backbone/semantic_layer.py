"""The semantic layer of SeMask and its semantic attention (arXiv 2112.12782, section 3.2).

It follows the blocks of a stage and does not depend on the encoder: token maps (B, H, W, C) in,
token maps and semantic-prior maps out.
"""

import torch
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.backbone.windows import (
    crop,
    pad_to_multiple,
    window_partition,
    window_reverse,
)

INITS = ("live", "published")
NORM_PLACEMENTS = ("stream", "branch")


def norm_placement(setting: str, *, default: str) -> str:
    """The position of a semantic layer's normalisation, from ``MODEL.SEMASK.NORM``.

    Args:
        setting: "stream", "branch" or "auto".
        default: the meaning of "auto" for this encoder.

    Raises:
        ConfigError: the setting is none of these.
    """
    if setting not in ("auto", *NORM_PLACEMENTS):
        raise ConfigError(
            f"MODEL.SEMASK.NORM is '{setting}'; set it to auto, {' or '.join(NORM_PLACEMENTS)}."
        )
    return default if setting == "auto" else setting


class SemanticAttention(nn.Module):
    """Attention whose queries and keys are class logits: tokens of a class attend to each other.

    x + gamma * proj(softmax(query(x) key(x)^T) value(x)), section 3.2. The queries are also the
    semantic prior, which the prior's loss supervises.

    Args:
        dim: channels C.
        num_classes: K.
        dropout: rate at the end.
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

    def forward(self, x: Tensor, return_query: bool = True) -> tuple[Tensor, Tensor | None]:
        """Mask the features with their semantic similarity.

        Args:
            x: (groups, tokens, C); a group is a window or a whole map.
            return_query: whether to return the query.

        Returns:
            The features (groups, tokens, C), and the semantic query (groups, tokens, K) or None.
        """
        query, key, value = self.query(x), self.key(x), self.value(x)
        masked = self.attend(query, key, value)
        out = self.gamma * self.dropout(self.proj(masked)) + x
        return out, query if return_query else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(query key^T) value, without scaling and without heads.

        Args:
            query, key: (groups, tokens, K).
            value: (groups, tokens, C).

        Returns:
            (groups, tokens, C).
        """
        return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value


class SemanticLayer(nn.Module):
    """Normalise, then one or more chained semantic attention blocks, in windows or globally.

    Args:
        dim: channels C of the stage.
        num_classes: classes K of the semantic-prior map.
        window_size: side of the (never shifted) windows in tokens; None = attend globally.
        num_blocks: chained attention blocks, at least 1; the last one's query is the prior.
        dropout: rate at the end of each block.
        init: "live" or "published", see :meth:`init_weights`.
        norm: "stream" = the layer's output is normalised, as published; "branch" = the blocks see
            normalised features, and their contribution is added to the input, so with gamma 0 the
            layer is the identity.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_classes: int,
        window_size: int | None,
        num_blocks: int = 1,
        dropout: float = 0.1,
        init: str = "live",
        norm: str = "stream",
    ) -> None:
        super().__init__()
        norm = norm_placement(norm, default="stream")
        if init not in INITS:
            raise ConfigError(f"MODEL.SEMASK.INIT is '{init}'; set it to {' or '.join(INITS)}.")
        if num_blocks < 1:
            raise ValueError(f"A semantic layer needs at least one block, got {num_blocks}")
        if num_classes < 1:
            raise ValueError(f"A semantic layer needs at least one class, got {num_classes}")
        self.window_size = window_size
        self.norm_on_branch = norm == "branch"
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(
            SemanticAttention(dim=dim, num_classes=num_classes, dropout=dropout)
            for _ in range(num_blocks)
        )
        self.init_weights(init)

    def init_weights(self, init: str = "live") -> None:
        """Linears with zero biases; gamma is 0 anyhow.

        Args:
            init: "live" = truncated normal (std 0.02): as ``proj`` is not 0, gamma has a gradient
                from the first step on. "published" = the start of the published models with mask
                decoders: Kaiming normal, and ``proj`` 0. The gradients of ``proj`` and of gamma
                are then 0 for ever, and the attention never acts.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if init == "live":
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        if init == "published":
            for module in self.modules():
                if isinstance(module, SemanticAttention):
                    nn.init.zeros_(module.proj.weight)

    def forward(self, x: Tensor, return_prior: bool = True) -> tuple[Tensor, Tensor | None]:
        """Features and prior of a stage.

        Args:
            x: (B, H, W, C).
            return_prior: whether to return the prior.

        Returns:
            Masked features (B, H, W, C), and prior logits (B, H, W, K) or None.
        """
        normed = self.norm(x)
        masked, prior = self.mask(normed, return_prior)
        return self.join(x, normed, masked), prior

    def join(self, x: Tensor, normed: Tensor, masked: Tensor) -> Tensor:
        """The layer's output; all maps have one shape.

        Args:
            x: the input.
            normed: the normalised input.
            masked: the output of the blocks for ``normed``.
        """
        # The bracket is what the blocks add to their input: exactly 0 with gamma 0. In
        # x + masked - normed the sum would be rounded, and the result would not be x again.
        return x + (masked - normed) if self.norm_on_branch else masked

    def mask(self, x: Tensor, return_prior: bool) -> tuple[Tensor, Tensor | None]:
        """The blocks, in windows or globally, on normalised features; see :meth:`forward`."""
        if self.window_size is None:
            tokens, prior = self.through_blocks(x.flatten(1, 2), return_prior)
            return tokens.view(x.shape), None if prior is None else prior.view(*x.shape[:3], -1)
        height, width = x.shape[1:3]
        padded = pad_to_multiple(x, self.window_size)  # padded tokens take part, as published
        windows = window_partition(padded, self.window_size)
        windows, prior = self.through_blocks(windows, return_prior)
        size = padded.shape[1:3]
        x = crop(window_reverse(windows, self.window_size, *size), height, width)
        if prior is not None:
            prior = crop(window_reverse(prior, self.window_size, *size), height, width)
        return x, prior

    def through_blocks(self, groups: Tensor, return_prior: bool) -> tuple[Tensor, Tensor | None]:
        """All blocks in a row; see :meth:`SemanticAttention.forward`."""
        prior = None
        for block in self.blocks:
            groups, prior = block(groups, return_prior)
        return groups, prior
