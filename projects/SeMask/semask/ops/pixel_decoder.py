"""The deformable pixel decoder with few maps in memory.

In evaluation a few buffers are reused, because repeated allocation of large blocks fragments the
heap. In training the feed-forward part of a layer, whose activations are four times as large as
the tokens, is computed a few tokens at a time and recomputed in the backward pass: the activations
stay in the cache, and only the input is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from semask.modeling.layers.deformable_attention import Size
from semask.modeling.pixel_decoder.deformable import (
    DeformablePixelDecoder,
    Encoder,
    EncoderLayer,
)
from semask.ops.convolutions import convolve_
from semask.ops.deformable_attention import BaggedDeformableAttention, TokenTable, query_chunks
from semask.ops.modes import is_inference, is_tracing
from semask.ops.recompute import Call, call, call_unvalued
from semask.ops.stripes import MapRows, resized, stripes
from semask.utils.precision import autocast_off

# Tokens at a time: 1,024 hidden channels of them are 8 MiB.
CHUNK_TOKENS = 2048

# From tokens (n, C) to tokens (n, C), given how the last linear layer is computed.
TokenFunction = Callable[[Tensor, Call], Tensor]


class ChunkedEncoder(Encoder):
    """In evaluation, computes a whole layer for a few queries at a time.

    Memory holds the input, one table of values, and the output, which is also the next layer's
    input. The layers need :class:`BaggedDeformableAttention`.
    """

    def forward(self, x: Tensor, position: Tensor, points: Tensor, sizes: Sequence[Size]) -> Tensor:
        """See :class:`Encoder`."""
        layers = [
            (layer, layer.self_attn)
            for layer in self.layers
            if isinstance(layer, EncoderLayer)
            and isinstance(layer.self_attn, BaggedDeformableAttention)
        ]
        if not is_inference(self) or len(layers) < len(self.layers):
            return super().forward(x, position, points, sizes)
        first = layers[0][1]
        heads, dim = first.num_heads, x.shape[-1] // first.num_heads
        layout = TokenTable(len(x), heads, tuple(sizes), x.device)
        table = layout.zeros(dim, torch.promote_types(x.dtype, torch.float32))
        starts = first.starts(points, sizes)
        out = torch.empty_like(x)
        for layer, attention in layers:
            for inside, level in zip(layout.inside(table), layout.levels(x), strict=True):
                for rows in stripes(level.shape[1], level[:, 0].nbytes, level.device):
                    inside[:, rows] = attention.values(level[:, rows])
            for part in query_chunks(x.shape[1]):
                tokens = x[:, part]
                query = tokens + position[part]
                tokens = layer.norm1(tokens + attention.read(query, starts[part], layout, table))
                hidden = F.relu(layer.linear1(tokens))
                out[:, part] = layer.norm2(tokens + layer.linear2(hidden))
            x = out
        return x


class LeanDeformablePixelDecoder(DeformablePixelDecoder):
    """In evaluation, keeps the coarser maps once and a single map of stride 4."""

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See :class:`DeformablePixelDecoder`."""
        if not is_inference(self):
            return super().forward(features)
        own_type = self.transformer.level_embed.dtype
        finest, *coarser = [feature.to(own_type) for feature in self.pick(features)]
        with autocast_off(finest.device):
            maps = self.transformer.encode(*self._tokens(coarser[::-1]))
            fused = self.adapter_1(finest)
            add_resized_(fused, maps[-1])
            fused = convolve_(self.layer_1, fused)
            return convolve_(self.mask_features, fused), maps

    def _tokens(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
        """The projected features (B, S, C), and the sizes of the maps."""
        maps = [
            project(feature).flatten(2).transpose(1, 2)
            for project, feature in zip(self.input_proj, features, strict=True)
        ]
        return torch.cat(maps, dim=1), [(f.shape[-2], f.shape[-1]) for f in features]


def add_resized_(finest: Tensor, coarser: Tensor) -> None:
    """Add a bilinearly up-sampled map to another one, in place, a few rows at a time.

    Args:
        finest: (B, C, H, W).
        coarser: (B, C, h, w).
    """
    size = (finest.shape[-2], finest.shape[-1])
    for image, source in zip(finest, coarser, strict=True):
        source_rows = resized(MapRows(source), size)
        for rows in stripes(size[0], image[:, 0].nbytes, image.device):
            image[:, rows] += source_rows[rows].permute(2, 0, 1)


class RecomputedEncoderLayer(EncoderLayer):
    """The deformable transformer's layer; with dropout in training it is the plain one."""

    def forward(self, x: Tensor, position: Tensor, points: Tensor, sizes: Sequence[Size]) -> Tensor:
        """See :class:`EncoderLayer`."""
        if is_tracing() or (self.training and self.dropout.p > 0):
            return super().forward(x, position, points, sizes)
        x = x + self.self_attn(x + position, points, x, sizes)
        parts = (self.norm1, self.linear1, self.linear2)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        tokens = recompute_tokens(self._feed_forward, x.flatten(0, -2), parameters)
        return self.norm2(tokens.view_as(x))

    def _feed_forward(self, x: Tensor, compute: Call) -> Tensor:
        x = self.norm1(x)
        return x + compute(self.linear2, F.relu(self.linear1(x)))


def recompute_tokens(
    function: TokenFunction, x: Tensor, parameters: Sequence[nn.Parameter]
) -> Tensor:
    """Apply a function to each token and keep only its input for the gradient.

    Args:
        function: acts on each token alone, without random numbers.
        x: (N, C).
        parameters: all parameters that it uses.

    Returns:
        (N, C). It can be differentiated once.
    """
    out: Tensor = _Recomputed.apply(function, x, *parameters)
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: TokenFunction, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x, *parameters)
        out = torch.empty_like(x)
        for part in _parts(x):
            out[part] = function(x[part], call)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        sources = [p for p, is_wanted in zip(parameters, wanted, strict=True) if is_wanted]
        sums = [torch.zeros_like(source) for source in sources]
        grad_x = torch.empty_like(x)
        for part in _parts(x):
            tokens = x[part].detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.function(tokens, call_unvalued)
            grad_x[part], *found = torch.autograd.grad(out, [tokens, *sources], grad[part])
            for total, addend in zip(sums, found, strict=True):
                total += addend
        of_parameters = iter(sums)
        return None, grad_x, *(next(of_parameters) if each else None for each in wanted)


def _parts(x: Tensor) -> Iterator[slice]:
    for start in range(0, len(x), CHUNK_TOKENS):
        yield slice(start, start + CHUNK_TOKENS)
