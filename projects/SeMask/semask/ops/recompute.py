"""The gradient of a block from the block's input alone, a few windows at a time.

Between its input and its output a Swin block makes some twenty times as much as it is given, and
all of that is usually kept for the gradient. Here it is made again in the backward pass, for a
few windows at a time, which do not see each other: what is alive at any moment fits into a cache.
It is the same as ``torch.utils.checkpoint`` for each of them, which would keep each one's random
state and leave it to the caller to put the windows together.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from semask.ops.window import WindowLayout, WindowPart, map_parts, window_parts

# How a layer is computed.
Call = Callable[[nn.Module, Tensor], Tensor]
# (some of the windows, their tokens (n, C), other inputs, how the last linear layer is computed)
# to the tokens (n, C) behind the block
PartOfBlock = Callable[[WindowPart, Tensor, Sequence[Tensor], Call], Tensor]


def recompute(
    block: PartOfBlock,
    tokens: Tensor,
    layout: WindowLayout,
    inputs: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
) -> Tensor:
    """The tokens behind a block of which nothing is kept for the gradient.

    Args:
        block: computes a part of it, at random in nothing.
        tokens: (B * H * W, C).
        layout: of the windows.
        inputs: what ``block`` is given besides.
        parameters: all that it uses, some of which may be frozen.

    Returns:
        (B * H * W, C). It can be differentiated once.
    """
    out: Tensor = _Recomputed.apply(block, layout, len(inputs), tokens, *inputs, *parameters)
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: PartOfBlock,
        layout: WindowLayout,
        num_inputs: int,
        tokens: Tensor,
        *others: Tensor,
    ) -> Tensor:
        ctx.block, ctx.layout, ctx.num_inputs = block, layout, num_inputs
        ctx.autocast = _autocast(tokens.device.type)
        ctx.save_for_backward(tokens, *others)
        with ctx.autocast():
            return map_parts(
                lambda part, x: block(part, x, others[:num_inputs], call), tokens, layout
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tokens, *others = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        inputs = [
            tensor.detach().requires_grad_(is_wanted)
            for tensor, is_wanted in zip(others[: ctx.num_inputs], wanted, strict=False)
        ]
        others = [*inputs, *others[ctx.num_inputs :]]
        sources = [tensor for tensor, is_wanted in zip(others, wanted, strict=True) if is_wanted]
        sums = [torch.zeros_like(source) for source in sources]
        grad_tokens = torch.empty_like(tokens)
        for part in window_parts(ctx.layout):
            x = part.take(tokens).detach().requires_grad_()
            with torch.enable_grad(), ctx.autocast():
                out = ctx.block(part, x, inputs, call_unvalued)
            grad_x, *found = torch.autograd.grad(
                out, [x, *sources], part.take(grad), allow_unused=True
            )
            part.put(grad_x, grad_tokens)
            for total, addend in zip(sums, found, strict=True):
                if addend is not None:
                    total += addend
        of_others = iter(sums)
        rest = [next(of_others) if is_wanted else None for is_wanted in wanted]
        return None, None, None, grad_tokens, *rest


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``."""
    out: Tensor = layer(x)
    return out


def call_unvalued(layer: nn.Module, x: Tensor) -> Tensor:
    """The same for a layer of which only the gradient is asked for."""
    hooks = layer._forward_pre_hooks or layer._forward_hooks
    if type(layer) is not nn.Linear or hooks:  # pruned, adapted, ...: only it knows how
        return call(layer, x)
    out: Tensor = _UnvaluedLinear.apply(x, layer.weight, layer.bias)
    return out


class _UnvaluedLinear(torch.autograd.Function):
    """A linear layer whose value is undefined and whose gradient is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), (grad.T @ x).to(weight.dtype), grad.sum(0)


def _autocast(device_type: str) -> Callable[[], AbstractContextManager[None]]:
    """Makes the mixed precision that is in use now; the backward pass does not know it.

    Without its cache, which would hand a weight that was cast without gradients to what needs them.
    """
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
