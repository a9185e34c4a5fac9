"""Matrix products of float32 by oneDNN.

PyTorch multiplies float32 matrices on the CPU by MKL, which leaves AVX-512 unused on AMD's
processors. oneDNN, which is part of PyTorch as well and computes its convolutions, uses it, and
takes less than half of the time there. Both are float32 throughout.

The fast path "onednn" replaces linear layers by :class:`OneDnnLinear`. Other fast forms call the
functions of this module for products of their own: "winograd", "pointwise", "folded", "levelled",
"recomputed".
"""

import contextlib
import math
import platform
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from semask.ops.modes import is_tracing

# Multiplications from which a call of oneDNN pays.
SMALLEST = 2**22
# Rows that are multiplied at a time for the gradient of a weight: oneDNN copies its factors.
ROWS = 2**10
# Rows of a weight that are multiplied at a time: oneDNN copies it, and for masks it is a map.
MOST_OUTPUTS = 2**14


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether this machine and PyTorch are those that the module's description speaks of."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return platform.processor()


class OneDnnLinear(nn.Linear):
    """A linear layer by oneDNN; small ones and other types of numbers use the plain form."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., O)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; by oneDNN where that is faster, and then it can be differentiated once.

    Args:
        x: (..., C).
        weight: (O, C), with any strides.
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    if x.dim() < 2 or not _usable(x, weight, x.shape[:-1].numel()):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
    return out.unflatten(0, x.shape[:-1])


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of matrices (n, k) and (k, m), without gradients."""
    if not _usable(left, right, left.shape[0]):
        return left @ right
    return onednn_linear(left, right.T, None)


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm`` of (B, n, k) and (B, k, m), without gradients."""
    if not _usable(left[0], right[0], left.shape[1]):
        return torch.bmm(left, right)
    out = left.new_empty(*left.shape[:2], right.shape[2])
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        out[index] = onednn_linear(one, other.T, None)
    return out


def linear_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a linear layer's input, weight and bias, each where it is wanted.

    Args:
        x: (n, C).
        weight: (O, C).
        grad: (n, O).
        wanted: of the three.
    """
    return (
        product(grad, weight) if wanted[0] else None,
        _weight_gradient(x, grad) if wanted[1] else None,
        grad.sum(0) if wanted[2] else None,
    )


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """``grad.T @ x`` of (n, C) and (n, O)."""
    is_narrow = x.shape[1] < grad.shape[1]  # the left factor is copied: the smaller one
    left, right = (x, grad) if is_narrow else (grad, x)
    total = left.new_zeros(left.shape[1], right.shape[1])
    for left_rows, right_rows in zip(left.split(ROWS), right.split(ROWS), strict=True):
        total += product(left_rows.T, right_rows)
    return total.T if is_narrow else total


def onednn_operations() -> dict[Any, Callable[..., int]]:
    """For PyTorch's ``FlopCounterMode``, which does not know oneDNN's products."""

    def operations(x: Sequence[int], weight: Sequence[int], *_inputs: Any, **_options: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return {}
    return {torch.ops.mkldnn._linear_pointwise: operations}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return linear_gradients(x, weight, grad, ctx.needs_input_grad)


def _usable(x: Tensor, weight: Tensor, rows: int) -> bool:
    return (
        rows * weight.numel() >= SMALLEST
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and onednn_is_faster()
        and not is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear` of a matrix by oneDNN, whatever its size; without gradients."""
    if len(weight) > MOST_OUTPUTS:
        out = x.new_empty(len(x), len(weight))
        for start in range(0, len(weight), MOST_OUTPUTS):
            part = slice(start, start + MOST_OUTPUTS)
            out[:, part] = onednn_linear(x, weight[part], None if bias is None else bias[part])
        return out
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        # oneDNN is hundreds of times slower with a weight that has gaps, such as a slice.
        weight = weight.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result
