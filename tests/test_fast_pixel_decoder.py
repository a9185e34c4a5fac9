"""Faster forms of the pixel decoders' parts give what the plain ones give."""

import copy

import pytest
import torch
from torch import Tensor, nn

from semask.modeling.layers.deformable_attention import (
    MultiScaleDeformableAttention,
    reference_points,
)
from semask.ops.apply import apply_fast_paths
from semask.ops.deformable_attention import BaggedDeformableAttention

SIZES = [(3, 4), (6, 7), (11, 13)]


def attention(spread: float) -> tuple[MultiScaleDeformableAttention, Tensor, Tensor]:
    """A layer whose points lie ``spread`` tokens away, with tokens and their positions."""
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(channels=32, num_heads=4).double()
    nn.init.normal_(layer.sampling_offsets.weight, std=spread / 32**0.5)
    nn.init.normal_(layer.attention_weights.weight)
    tokens = torch.randn(2, sum(h * w for h, w in SIZES), 32, dtype=torch.float64)
    return layer, tokens, reference_points(SIZES, torch.float64)


@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])  # 20: most points lie outside
def test_bagged_deformable_attention(spread: float) -> None:
    plain, tokens, points = attention(spread)
    plain.eval()
    fast = apply_fast_paths(copy.deepcopy(plain), ["bagged"])
    assert type(fast) is BaggedDeformableAttention
    with torch.no_grad():
        expected = plain(tokens, points, tokens, SIZES)
        assert torch.allclose(fast(tokens, points, tokens, SIZES), expected, atol=1e-12)
        single = fast.float()(tokens.float(), points.float(), tokens.float(), SIZES)
    assert torch.allclose(single.double(), expected, atol=1e-4)


def test_bagged_deformable_attention_in_training_is_the_plain_one() -> None:
    plain, tokens, points = attention(1.0)
    fast = apply_fast_paths(copy.deepcopy(plain), ["bagged"])
    results = []
    for layer in (plain, fast):
        inputs = tokens.clone().requires_grad_()
        output = layer(inputs, points, inputs, SIZES)
        output.square().sum().backward()
        assert inputs.grad is not None
        results.append((output, inputs.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
