"""Winograd's products equal the convolution, with its gradients, at any size."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn

from semask.ops import winograd
from semask.ops.apply import apply_fast_paths
from semask.ops.convolutions import WinogradConv2d

SIZES = [(1, 1), (2, 9), (5, 7), (8, 8), (1, 6)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients(size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=dtype, requires_grad=True)
    expected = F.conv2d(x, weight, padding=1)
    value = winograd.convolution(x, weight)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
        rtol=tolerance,
        atol=10 * tolerance,
    )


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 7, 3, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    grad = torch.randn(2, 9, 7, 4, dtype=torch.float64)
    filters = winograd.transform_filters(weight)
    whole = winograd.convolve(x, filters), winograd.filter_gradient(x, grad)
    monkeypatch.setattr(winograd, "CHUNK_BYTES", 1)  # one row of tiles at a time
    parts = winograd.convolve(x, filters), winograd.filter_gradient(x, grad)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def layers(norm: str, bias: bool = True) -> tuple[WinogradConv2d, Conv2d]:
    """A layer in its fast and its plain form, with the same numbers, none of them trivial."""
    torch.manual_seed(0)
    keys = {"kernel_size": 3, "padding": 1, "activation": F.relu, "bias": bias}
    fast, plain = (Conv2d(3, 4, norm=get_norm(norm, 4), **keys).double() for _ in range(2))
    for tensor in [*fast.parameters(), *fast.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    plain.load_state_dict(fast.state_dict())
    apply_fast_paths(fast, ["winograd"])
    assert isinstance(fast, WinogradConv2d)
    return fast, plain


def compare(fast: Conv2d, plain: Conv2d, x: Tensor) -> None:
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["", "BN", "group"])
@pytest.mark.parametrize("bias", [False, True])
def test_layer(norm: str, bias: bool) -> None:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    fast, plain = layers("BN" if norm == "group" else norm, bias)
    if norm == "group":  # no scale of the output by known numbers, so nothing can be folded
        fast.norm, plain.norm = nn.GroupNorm(2, 4).double(), nn.GroupNorm(2, 4).double()
    compare(fast.train(), plain.train(), x)
    compare(fast.eval(), plain.eval(), x)
    with torch.no_grad():
        compare(fast, plain, x)
    with torch.inference_mode():
        compare(fast, plain, x)


@pytest.mark.parametrize("change", ["weight", "running_mean", "load", "data", "copy"])
def test_folded_filters_follow_the_layer(change: str) -> None:
    x = torch.randn(1, 3, 6, 5, dtype=torch.float64)
    fast, plain = (layer.eval() for layer in layers("BN"))
    with torch.no_grad():
        compare(fast, plain, x)  # now the filters are remembered
        for layer in (fast, plain):
            if change == "weight":
                layer.weight.mul_(2)
            elif change == "running_mean":
                layer.norm.running_mean.add_(1)
            elif change == "load":
                state = {name: value + 1 for name, value in layer.state_dict().items()}
                layer.load_state_dict(state)
            elif change == "data":
                layer.weight.data = layer.weight + 1
        if change == "copy":
            fast = copy.deepcopy(fast)
            fast.weight.add_(1)
            plain.weight.add_(1)
        compare(fast, plain, x)


@pytest.mark.parametrize(
    "keys",
    [
        {"kernel_size": 1},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 3},
    ],
)
def test_other_convolutions_are_left_as_they_are(keys: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 7, 6)
    conv = Conv2d(3, 6, **keys)
    expected = conv(x)
    assert torch.equal(apply_fast_paths(conv, ["winograd"])(x), expected)


def test_mixed_precision_is_the_librarys() -> None:
    """Folded filters of one precision are not used for the other."""
    x = torch.randn(1, 3, 6, 5)
    fast, plain = (layer.float().eval() for layer in layers("BN"))
    with torch.no_grad():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(fast(x), plain(x))
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2**20])
def test_a_convolution_may_overwrite_its_input(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "CHUNK_BYTES", at_once)
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 3, dtype=torch.float64)
    filters = winograd.transform_filters(torch.randn(3, 3, 3, 3, dtype=torch.float64))
    expected = winograd.convolve(x, filters)
    assert winograd.convolve(x, filters, out=x) is x
    assert torch.equal(x, expected)
