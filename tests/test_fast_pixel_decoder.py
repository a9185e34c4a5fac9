"""Faster forms of the pixel decoders' parts equal the plain ones."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semask.modeling.layers.deformable_attention import (
    MultiScaleDeformableAttention,
    reference_points,
)
from semask.modeling.pixel_decoder.deformable import EncoderLayer
from semask.ops import pixel_decoder
from semask.ops.apply import apply_fast_paths
from semask.ops.deformable_attention import BaggedDeformableAttention

SIZES = [(3, 4), (6, 7), (11, 13)]


def attention(spread: float) -> tuple[MultiScaleDeformableAttention, Tensor, Tensor]:
    """A layer whose points lie ``spread`` tokens away, with tokens and their positions."""
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(channels=32, num_heads=4).double()
    nn.init.normal_(layer.sampling_offsets.weight, std=spread / 32**0.5)
    # Between the tokens, where the gradient is one number and not one for each side.
    nn.init.uniform_(layer.sampling_offsets.bias, -3, 3)
    nn.init.normal_(layer.attention_weights.weight)
    tokens = torch.randn(2, sum(h * w for h, w in SIZES), 32, dtype=torch.float64)
    return layer, tokens, reference_points(SIZES, torch.float64)


@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])  # 20: most points lie outside
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("training", [True, False])
def test_bagged_deformable_attention(
    spread: float, dtype: torch.dtype, tolerance: float, training: bool
) -> None:
    plain, tokens, points = attention(spread)
    plain, tokens, points = plain.to(dtype).train(training), tokens.to(dtype), points.to(dtype)
    fast = apply_fast_paths(copy.deepcopy(plain), ["bagged"])
    assert type(fast) is BaggedDeformableAttention
    pull = torch.randn(tokens.shape, dtype=dtype)
    results = []
    for layer in (plain, fast):
        query, value = (tokens.clone().requires_grad_() for _ in range(2))
        output = layer(query, points, value, SIZES)
        output.backward(pull)
        with torch.no_grad():
            assert torch.equal(layer(query, points, value, SIZES), output)
        results.append([output, query.grad, value.grad, *(p.grad for p in layer.parameters())])
    for want, got in zip(*results, strict=True):
        assert want is not None
        assert got is not None
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


def test_bagged_deformable_attention_with_frozen_parts() -> None:
    plain, tokens, points = attention(1.0)
    plain.value_proj.requires_grad_(False)
    fast = apply_fast_paths(copy.deepcopy(plain), ["bagged"])
    gradients = []
    for layer in (plain, fast):
        query = tokens.clone().requires_grad_()
        layer(query, points, tokens, SIZES).square().sum().backward()
        gradients.append(query.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_bagged_deformable_attention_of_what_is_not_finite() -> None:
    plain, tokens, points = attention(1.0)
    fast = apply_fast_paths(plain, ["bagged"])
    tokens[0, 3] = float("nan")
    tokens[0, 4] = float("inf")
    tokens.requires_grad_()
    output = fast(tokens, points, tokens, SIZES)
    assert output[0, 3].isnan().all()
    assert output[1].isfinite().all()
    output.sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[0].isnan().any()


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [(), ("norm1", "linear2")])
def test_recomputed_encoder_layer(
    tokens: int, dropout: float, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_decoder, "CHUNK_TOKENS", tokens)
    _, x, points = attention(1.0)
    plain = EncoderLayer(
        channels=32, hidden_channels=64, dropout=dropout, num_levels=3, num_heads=4, num_points=4
    ).double()
    nn.init.uniform_(plain.self_attn.sampling_offsets.bias, -3, 3)
    for name in frozen:
        plain.get_submodule(name).requires_grad_(False)
    fast = apply_fast_paths(copy.deepcopy(plain), ["recomputed"])
    assert type(fast) is pixel_decoder.RecomputedEncoderLayer
    position, pull = torch.randn_like(x[0]), torch.randn_like(x)
    for training in (True, False):
        results = []
        for layer in (plain, fast):
            layer.train(training).zero_grad()
            torch.manual_seed(0)
            inputs = x.clone().requires_grad_()
            output = layer(inputs, position, points, SIZES)
            output.backward(pull)
            gradients = [p.grad for p in layer.parameters() if p.requires_grad]
            results.append([output, inputs.grad, *gradients])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_bagged_deformable_attention_does_not_read_unwritten_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uninitialised memory can contain NaN."""
    layer, tokens, points = attention(1.0)
    fast = apply_fast_paths(layer, ["bagged"])
    new_empty = Tensor.new_empty

    def with_nan(self: Tensor, *shape: int, **options: Any) -> Tensor:
        memory = new_empty(self, *shape, **options)
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory

    monkeypatch.setattr(Tensor, "new_empty", with_nan)
    query = tokens.clone().requires_grad_()
    fast(query, points, tokens, SIZES).square().sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
