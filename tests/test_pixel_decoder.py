"""The pixel decoders alone: parameters, initialisation, precision and refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor

from reference_masks import CASES, PIXEL_DECODERS, build_pixel_decoder, load_meta
from semask.errors import ConfigError
from semask.modeling.layers.deformable_attention import MultiScaleDeformableAttention
from semask.modeling.pixel_decoder import (
    DeformablePixelDecoder,
    FaPNPixelDecoder,
    FPNPixelDecoder,
    MSFaPNPixelDecoder,
    PixelDecoder,
)
from semask.modeling.pixel_decoder.fapn import GuidedDeformableConv

SHAPES = {f"res{i + 2}": ShapeSpec(channels=8 * 2**i, stride=4 * 2**i) for i in range(4)}
DECODERS = pytest.mark.parametrize("build", PIXEL_DECODERS.values())


def features(height: int = 64, width: int = 96, batch: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: torch.randn(
            batch, shape.channels, -(-height // shape.stride), -(-width // shape.stride)
        )
        for name, shape in SHAPES.items()
    }


def small(build: Callable[..., PixelDecoder]) -> PixelDecoder:
    torch.manual_seed(1)
    return build(input_shape=SHAPES, channels=32, mask_channels=16)


@pytest.mark.parametrize("case", CASES)
def test_published_number_of_parameters(case: str) -> None:
    with torch.device("meta"):
        decoder = build_pixel_decoder(case)
    assert (
        sum(parameter.numel() for parameter in decoder.parameters())
        == load_meta(case)["parameters"]["pixel_decoder"]
    )


@DECODERS
def test_any_size_and_gradients_everywhere(build: Callable[..., PixelDecoder]) -> None:
    decoder = small(build)
    inputs = features(70, 90)
    mask_features, maps = decoder(inputs)
    assert mask_features.shape == (2, 16, 18, 23)
    assert [each.shape[-2:] for each in maps] == [
        inputs[name].shape[-2:] for name in ("res5", "res4", "res3")
    ]
    assert {each.shape[1] for each in maps} == {32}
    mask_features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@DECODERS
def test_further_outputs_of_the_backbone_are_passed_over(
    build: Callable[..., PixelDecoder],
) -> None:
    decoder = small(build)
    inputs = features()
    expected, _ = decoder(inputs)
    got, _ = decoder({"prior5": torch.zeros(1), **inputs, "p6": torch.zeros(1)})
    assert torch.equal(got, expected)


@pytest.mark.parametrize("build", [DeformablePixelDecoder, MSFaPNPixelDecoder])
def test_deformable_decoders_do_not_follow_autocast(build: Callable[..., PixelDecoder]) -> None:
    decoder = small(build).eval()
    inputs = features()
    expected, expected_maps = decoder(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, maps = decoder(inputs)
    assert torch.equal(got, expected)
    assert all(map(torch.equal, maps, expected_maps))


@pytest.mark.parametrize("build", [FPNPixelDecoder, FaPNPixelDecoder])
def test_pyramids_follow_autocast(build: Callable[..., PixelDecoder]) -> None:
    decoder = small(build).eval()
    inputs = features()
    expected, _ = decoder(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = decoder(inputs)
    assert got.dtype == torch.bfloat16
    assert 0 < (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_alignment_samples_in_float32_under_autocast() -> None:
    convolution = GuidedDeformableConv(channels=16, groups=2)
    torch.nn.init.normal_(convolution.conv_offset_mask.weight)
    x, guide = torch.randn(2, 1, 16, 9, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolution(x, guide).dtype == torch.float32


def test_deformable_convolution_starts_as_half_a_convolution() -> None:
    convolution = GuidedDeformableConv(channels=16, groups=2).double()
    x, guide = torch.randn(2, 1, 16, 9, 11, dtype=torch.float64)
    plain = torch.nn.functional.conv2d(x, 0.5 * convolution.weight, convolution.bias, padding=1)
    assert torch.allclose(convolution(x, guide), plain, atol=1e-12)


def test_deformable_attention_starts_with_a_ring_of_points() -> None:
    attention = MultiScaleDeformableAttention(channels=32, num_levels=2, num_heads=4, num_points=3)
    offsets = attention.sampling_offsets(torch.randn(1, 32)).view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    expected = directions[:, None, None] * torch.tensor([1.0, 2.0, 3.0])[:, None]
    assert torch.allclose(offsets, expected.expand_as(offsets), atol=1e-6)


def test_alignment_shares_its_norm_with_the_convolution_behind_it() -> None:
    fapn, msfapn = small(FaPNPixelDecoder), small(MSFaPNPixelDecoder)
    for decoder, level in ((fapn, 1), (fapn, 2), (fapn, 3), (msfapn, 1)):
        state = decoder.state_dict(keep_vars=True)
        for leaf in ("weight", "bias"):
            guide = state[f"align_{level}.offset.norm.{leaf}"]
            assert guide is state[f"layer_{level}.norm.{leaf}"]


@DECODERS
def test_missing_feature(build: Callable[..., PixelDecoder]) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "res3"}
    with pytest.raises(ConfigError, match=r"IN_FEATURES.*res4"):
        build(input_shape=shapes, channels=32)
    decoder = small(build)
    inputs = features()
    del inputs["res4"]
    with pytest.raises(ConfigError, match=r"IN_FEATURES.*res4.*res2, res3, res5"):
        decoder(inputs)


@DECODERS
@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"channels": 0}, "CONVS_DIM"),
        ({"channels": 40}, "CONVS_DIM"),
        ({"mask_channels": 0}, "MASK_DIM"),
    ],
)
def test_numbers_that_cannot_be(
    build: Callable[..., PixelDecoder], arguments: dict[str, int], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        build(input_shape=SHAPES, **{"channels": 32, **arguments})


@pytest.mark.parametrize(
    ("arguments", "key"),
    [({"num_layers": 0}, "TRANSFORMER_ENC_LAYERS"), ({"num_heads": 5}, "NHEADS")],
)
def test_transformers_that_cannot_be(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        DeformablePixelDecoder(input_shape=SHAPES, channels=32, **arguments)
