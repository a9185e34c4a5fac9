"""The faster forms of the Semantic-FPN decoder equal the plain one."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor

from largest import Largest
from semask.modeling import SemanticFPNDecoder
from semask.ops import semantic_fpn
from semask.ops.apply import apply_fast_paths

SHAPES = {f"res{i}": ShapeSpec(channels=i, stride=2**i) for i in range(2, 6)}


def decoder(norm: str = "BN", shapes: dict[str, ShapeSpec] = SHAPES) -> SemanticFPNDecoder:
    torch.manual_seed(0)
    head = SemanticFPNDecoder(
        input_shape=shapes, num_classes=3, conv_dims=32, norm=norm, dropout=0.0
    ).double()
    for buffer in head.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return head


def features_of(
    height: int, width: int, shapes: dict[str, ShapeSpec] = SHAPES
) -> dict[str, Tensor]:
    return {
        name: torch.randn(
            2, shape.channels, -(-height // shape.stride), -(-width // shape.stride)
        ).double()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("names", [["chunked"], ["chunked", "winograd"], ["early_sum", "chunked"]])
@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "GN"])
@pytest.mark.parametrize("band_bytes", [1, 10_000, 10**6])
@pytest.mark.parametrize(("height", "width"), [(80, 48), (61, 37), (3, 5)])
def test_in_bands(
    height: int,
    width: int,
    band_bytes: int,
    norm: str,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(semantic_fpn, "BAND_BYTES", band_bytes)
    plain = decoder(norm).eval()
    fast = apply_fast_paths(copy.deepcopy(plain), names)
    features = features_of(height, width)
    with torch.inference_mode():
        torch.testing.assert_close(fast(features), plain(features), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("names", [["early_sum"], ["early_sum", "winograd", "chunked"]])
def test_training(names: list[str]) -> None:
    """Value, gradients and statistics, also with two features of the finest stride."""
    shapes = {**SHAPES, "more": ShapeSpec(channels=4, stride=4)}
    plain = decoder(shapes=shapes)
    fast = apply_fast_paths(copy.deepcopy(plain), names)
    features = features_of(61, 37, shapes)
    results = []
    for head in (plain, fast):
        logits = head.train()(features)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in head.parameters()), *head.buffers()])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-8, check_stride=False)


def test_names_of_parameters_stay() -> None:
    plain = decoder()
    names = list(plain.state_dict())
    assert list(apply_fast_paths(plain, ["early_sum", "winograd", "chunked"]).state_dict()) == names
    assert "scale_heads.res5.4.norm.running_var" in names


def test_bands_hold_no_map_of_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic_fpn, "BAND_BYTES", 1)
    fast = apply_fast_paths(decoder().eval(), ["chunked", "early_sum"])
    features = {k: v[:1] for k, v in features_of(256, 256).items()}
    with torch.inference_mode(), Largest() as largest:
        fast(features)
    assert largest.values < 64 * 64 * 32
