"""Matrix products by oneDNN equal PyTorch's own, wherever the faster forms use them."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from plain_comparison import assert_close
from semask.ops import products, winograd
from semask.ops.apply import apply_fast_paths
from semask.ops.products import OneDnnLinear, batched_product, linear, product
from semask.ops.recompute import call_unvalued

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch has no oneDNN",
)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On any machine, for products of any size; lists the calls."""
    calls: list[int] = []
    multiply = products.onednn_linear

    def counted(*factors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return multiply(*factors)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "ROWS", 4)
    monkeypatch.setattr(products, "onednn_linear", counted)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["", "weight", "x"])
@pytest.mark.parametrize(("channels", "outputs"), [(16, 40), (40, 16)])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5)])
def test_linear_layer(
    shape: tuple[int, ...], channels: int, outputs: int, frozen: str, bias: bool, used: list[int]
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(channels, outputs, bias=bias)
    plain.weight.requires_grad_(frozen != "weight")
    fast = apply_fast_paths(copy.deepcopy(plain), ["onednn"])
    assert type(fast) is OneDnnLinear
    results = []
    for layer in (plain, fast):
        x = torch.linspace(-3, 3, channels * torch.Size(shape).numel()).sin()
        x = x.view(*shape, channels).requires_grad_(frozen != "x")
        y = layer(x)
        if y.requires_grad:
            y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    assert used
    for want, got in zip(*results, strict=True):
        assert (want is None) == (got is None)
        if want is not None and got is not None:
            assert got.shape == want.shape
            assert_close(got, want, "output or gradient")


def test_weights_of_any_strides(used: list[int]) -> None:
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 11), torch.randn(11)
    assert_close(linear(x, weight.T, bias), F.linear(x, weight.T, bias), "linear")
    left, right = torch.randn(3, 4, 5), torch.randn(3, 7, 5)
    want = left @ right.transpose(1, 2)
    assert_close(batched_product(left, right.transpose(1, 2)), want, "batched")
    assert_close(product(left[0].T, right[0, :4]), left[0].T @ right[0, :4], "product")
    assert len(used) == 5


def test_a_weight_of_many_rows_is_multiplied_in_parts(
    used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "MOST_OUTPUTS", 4)
    x, weight, bias = torch.randn(2, 6), torch.randn(11, 6), torch.randn(11)
    for own in (bias, None):
        used.clear()
        assert_close(linear(x, weight, own), F.linear(x, weight, own), "linear")
        assert len(used) == 4  # the call, and three parts


def test_slices_are_copied_before_the_product(used: list[int]) -> None:
    given: list[torch.Tensor] = []

    class Operands(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "_linear_pointwise" in str(func):
                given.append(args[1])
            return func(*args, **(kwargs or {}))

    x, wide, tall = torch.randn(9, 6), torch.randn(11, 8), torch.randn(6, 13)
    for weight in (wide[:, :6], tall[:, :11].T):
        with Operands():
            found = linear(x, weight)
        assert_close(found, F.linear(x, weight), "linear")
    assert len(given) == 2
    assert all(weight.is_contiguous() or weight.T.is_contiguous() for weight in given)


def test_gradient_of_a_layer_without_its_value(used: list[int]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 12)
    fast = apply_fast_paths(copy.deepcopy(plain), ["onednn"])
    x, pull = torch.randn(5, 8), torch.randn(5, 12)
    found = []
    for layer, call in ((plain, nn.Linear.__call__), (fast, call_unvalued)):
        inputs = x.clone().requires_grad_()
        found.append(torch.autograd.grad(call(layer, inputs), [inputs, *layer.parameters()], pull))
    assert len(used) == 3  # the weight's gradient in two parts
    for want, got in zip(*found, strict=True):
        assert_close(got, want, "gradient")


def test_convolution(used: list[int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 9, 8), torch.randn(5, 6, 3, 3)
    found = []
    for convolve in (partial(F.conv2d, padding=1), winograd.convolution):
        leaves = [each.clone().requires_grad_() for each in (x, weight)]
        y = convolve(leaves[0], leaves[1])
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert used
    for want, got in zip(*found, strict=True):
        assert_close(got, want, "output or gradient")


def test_operations_are_counted(used: list[int]) -> None:
    layer = apply_fast_paths(nn.Linear(8, 12), ["onednn"])
    counter = FlopCounterMode(display=False, custom_mapping=products.onednn_operations())
    with torch.no_grad(), counter:
        layer(torch.randn(3, 5, 8))
    assert used
    assert counter.get_total_flops() == 2 * 15 * 8 * 12


@pytest.mark.parametrize("case", ["double", "half", "vector", "autocast", "none"])
def test_other_numbers_use_the_plain_form(case: str, used: list[int]) -> None:
    dtype = {"double": torch.float64, "half": torch.bfloat16}.get(case, torch.float32)
    layer: Any = apply_fast_paths(nn.Linear(4, 4, dtype=dtype), ["onednn"])
    shape = {"vector": (4,), "none": (0, 4)}.get(case, (3, 4))
    x = torch.randn(shape, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not used


def test_can_be_compiled_and_exported(used: list[int]) -> None:
    layer = apply_fast_paths(nn.Linear(4, 4), ["onednn"]).eval()
    program = torch.export.export(layer, (torch.randn(3, 4),))
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("mkldnn" in name for name in names)
    assert not used
