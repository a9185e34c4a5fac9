"""Recompute a block in the backward pass from its input, a few windows at a time.

The intermediate values of a Swin block take some twenty times the memory of its input, and all of
them are usually kept for the gradient. Here they are recomputed in the backward pass, for a few
independent windows at a time, whose values fit into a cache. It equals ``torch.utils.checkpoint``
of each group of windows, without its random states and without concatenating the results.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from semask.ops.products import OneDnnLinear, linear_gradients
from semask.ops.window import WindowLayout, WindowPart, map_parts, window_parts

# Computes a layer.
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
    """The output of a block that keeps only its input for the gradient.

    Args:
        block: computes some of the windows, without random numbers.
        tokens: (B * H * W, C).
        layout: of the windows.
        inputs: further arguments of ``block``.
        parameters: all parameters that it uses; some may be frozen.

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
    """The same where only the gradient of the layer is needed."""
    hooks = layer._forward_pre_hooks or layer._forward_hooks
    if type(layer) not in (nn.Linear, OneDnnLinear) or hooks:  # pruned, adapted, ...: call it
        return call(layer, x)
    out: Tensor = _UnvaluedLinear.apply(x, layer.weight, layer.bias)
    return out


class _UnvaluedLinear(torch.autograd.Function):
    """A linear layer with an undefined value and the correct gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # Under autocast the weight is of another type.
        by_x, by_weight, by_bias = linear_gradients(x, weight.to(grad.dtype), grad, wanted)
        return by_x, None if by_weight is None else by_weight.to(weight.dtype), by_bias


def _autocast(device_type: str) -> Callable[[], AbstractContextManager[None]]:
    """A factory of the current autocast context, for the backward pass.

    Its cache is off: it could return a weight that was cast without gradients.
    """
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
