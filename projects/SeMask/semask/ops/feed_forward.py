"""A transformer layer's feed-forward part, a few tokens at a time, recomputed in the backward pass.

The activations between its linear layers are four times as large as the tokens. Here they stay in
the cache, and only the input is kept for the backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from semask.modeling.layers.deformable_attention import Size
from semask.modeling.pixel_decoder.deformable import EncoderLayer
from semask.ops.recompute import Call, call, call_unvalued
from semask.ops.tracing import traced

# Tokens at a time: 1,024 hidden channels of them are 8 MiB.
CHUNK_TOKENS = 2048

# From tokens (n, C) to tokens (n, C), given how the last linear layer is computed.
TokenFunction = Callable[[Tensor, Call], Tensor]


class RecomputedEncoderLayer(EncoderLayer):
    """The deformable transformer's layer; with dropout in training it is the plain one."""

    def forward(self, x: Tensor, position: Tensor, points: Tensor, sizes: Sequence[Size]) -> Tensor:
        """See :class:`EncoderLayer`."""
        if traced() or (self.training and self.dropout.p > 0):
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
