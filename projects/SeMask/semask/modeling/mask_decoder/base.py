"""The interface of the mask decoders, and the parts that they share.

Parameters have the names of the published checkpoints.
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from semask.errors import ConfigError


class MaskPrediction(NamedTuple):
    """Q pairs of a class and a mask for each image.

    Attributes:
        logits: (B, Q, K + 1) class logits; the last one is "no object".
        masks: (B, Q, h, w) mask logits at the size of the mask features.
    """

    logits: Tensor
    masks: Tensor


class MaskDecoder(nn.Module):
    """Queries that read feature maps and predict a class and a mask each.

    Attributes:
        num_classes: K, without "no object".
        num_queries: Q.
    """

    def __init__(
        self, *, num_classes: int, num_queries: int, num_predictions: int, dim: int, num_heads: int
    ) -> None:
        """
        Args:
            num_classes: K, at least 1.
            num_queries: Q, at least 1.
            num_predictions: supervised predictions, at least 1.
            dim: channels of the queries, a multiple of 4.
            num_heads: of every attention; divides ``dim``.

        Raises:
            ConfigError: an argument is out of its range.
        """
        super().__init__()
        if num_classes < 1:
            raise ConfigError(
                "A mask decoder needs classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
                f"{num_classes}."
            )
        if num_queries < 1:
            raise ConfigError(
                "A mask decoder needs queries, but MODEL.MASK_FORMER.NUM_OBJECT_QUERIES is "
                f"{num_queries}."
            )
        if num_predictions < 1:
            raise ConfigError(
                "A mask decoder needs layers: MODEL.MASK_FORMER.DEC_LAYERS, the number of "
                "supervised predictions, must be 1 or more."
            )
        if dim % 4 or num_heads < 1 or dim % num_heads:
            raise ConfigError(
                f"MODEL.MASK_FORMER.NHEADS is {num_heads} and MODEL.MASK_FORMER.HIDDEN_DIM {dim}; "
                "HIDDEN_DIM must be a multiple of NHEADS and of 4."
            )
        self.num_classes = num_classes
        self.num_queries = num_queries

    @abstractmethod
    def forward(
        self, maps: Sequence[Tensor], mask_features: Tensor, return_aux: bool | None = None
    ) -> list[MaskPrediction]:
        """Predict.

        Args:
            maps: (B, C, h_l, w_l) feature maps that the queries attend to.
            mask_features: (B, C, h, w); a mask is their product with an embedding of its query.
            return_aux: also return the predictions of the earlier layers; None = in training.

        Returns:
            The final prediction last; before it, on request, those of the earlier layers.
        """


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *dims: int) -> None:
        """
        Args:
            dims: channels of the input and of each layer's output.
        """
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dims[0]) to (..., dims[-1])."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def mask_logits(embeddings: Tensor, mask_features: Tensor) -> Tensor:
    """(B, Q, C) and (B, C, h, w) to (B, Q, h, w): the product over the channels."""
    return (embeddings @ mask_features.flatten(2)).unflatten(2, mask_features.shape[-2:])


def xavier_uniform(module: nn.Module) -> None:
    """Initialise every parameter of more than one dimension."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
