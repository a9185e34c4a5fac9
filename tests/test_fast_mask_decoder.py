"""Mask classification with its faster forms equals the plain one: losses, gradients, scores."""

import copy
from typing import Any

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn

from plain_comparison import TOLERANCE, assert_close, assert_equal_gradients
from semask.modeling.losses import Mask2FormerCriterion, Mask2FormerMatcher, MaskTarget
from semask.modeling.mask_decoder import Mask2FormerDecoder, MaskPrediction
from semask.ops import convolutions, deformable_attention, mask_losses, products
from semask.ops.apply import FAST_PATHS, apply_fast_paths
from tiny_masks import DECODERS, batch, build

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(decoder: str, names: Any = FAST_PATHS, **overrides: Any) -> tuple[Any, Any]:
    plain = build(decoder, SEMASK__DROPOUT=0.0, MASK_FORMER__DROPOUT=0.0, **overrides).double()
    for name, parameter in plain.named_parameters():
        if name.endswith("sampling_offsets.bias"):  # at whole tokens there are two gradients
            nn.init.uniform_(parameter, -3, 3)
    return apply_fast_paths(copy.deepcopy(plain), names), plain


def assert_equal_losses(model: Any, plain: Any, samples: list[dict[str, Any]]) -> None:
    found = []
    for each in (model, plain):
        each.train().zero_grad()
        torch.manual_seed(3)  # the same points
        losses = each(samples)
        torch.stack(list(losses.values())).sum().backward()
        found.append(losses)
    got, want = found
    assert list(got) == list(want)
    for name in want:
        assert_close(got[name], want[name], name)
    assert_equal_gradients(model, plain)


@pytest.mark.parametrize("large", [2**27, 1])
@pytest.mark.parametrize("decoder", DECODERS)
def test_model(decoder: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "LARGE_BYTES", large)
    monkeypatch.setattr(deformable_attention, "CHUNK_QUERIES", 7 * large)
    monkeypatch.setattr(mask_losses, "TARGET_BYTES", large)  # one target at a time, or all
    model, plain = pair(decoder)
    samples = batch((64, 96), (45, 70))
    assert_equal_losses(model, plain, samples)
    assert_equal_losses(model, plain, batch((33, 64), (64, 33), empty=(1,)))
    for each in (model, plain):
        each.eval()
    with torch.no_grad():
        for got, want in zip(model(samples), plain(samples), strict=True):
            assert_close(got["sem_seg"], want["sem_seg"], "scores")


@pytest.mark.parametrize("empty", [(0, 1), (0,)])
def test_images_without_targets(empty: tuple[int, ...]) -> None:
    model, plain = pair("mask2former", SEM_SEG_HEAD__PRIOR_LOSS_WEIGHT=0.0)
    assert_equal_losses(model, plain, batch((64, 96), (45, 70), empty=empty))


@pytest.mark.parametrize("return_aux", [True, False])
def test_predictions_of_all_layers(return_aux: bool) -> None:
    torch.manual_seed(0)
    plain = Mask2FormerDecoder(num_classes=4, num_queries=9, dim=32, mask_dim=16, num_heads=4)
    plain = plain.double().eval()
    fast = apply_fast_paths(copy.deepcopy(plain), ["levelled"])
    maps = [torch.randn(2, 32, *size).double() for size in ((3, 4), (5, 8), (10, 15))]
    features = torch.randn(2, 16, 20, 30).double()
    with torch.no_grad():
        found = fast(maps, features, return_aux), plain(maps, features, return_aux)
    assert len(found[0]) == (10 if return_aux else 1)
    for got, want in zip(*found, strict=True):
        for each, expected in zip(got, want, strict=True):
            assert_close(each, expected, "prediction")


@pytest.mark.parametrize("ratio", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_criterion(ratio: float, dtype: torch.dtype) -> None:
    """Also of a prediction of which it knows no factors, and of more masks than queries."""
    plain = Mask2FormerCriterion(
        matcher=Mask2FormerMatcher(num_points=50),
        num_points=50,
        oversample_ratio=1.0 if ratio == 1 else 3.0,
        importance_sample_ratio=ratio,
    )
    fast = apply_fast_paths(copy.deepcopy(plain), ["factored"])
    torch.manual_seed(0)
    inputs = torch.randn(2, 6, 5, dtype=dtype), 3 * torch.randn(2, 6, 8, 9, dtype=dtype)
    targets = [
        MaskTarget(torch.arange(n) % 4, torch.rand(n, 32, 36).round().bool()) for n in (3, 8)
    ]
    results = []
    for criterion in (plain, fast):
        leaves = [each.clone().requires_grad_() for each in inputs]
        torch.manual_seed(1)
        losses = criterion([MaskPrediction(*leaves)], targets)
        torch.stack(list(losses.values())).sum().backward()
        results.append([*losses.values(), *(leaf.grad for leaf in leaves)])
    for want, got in zip(*results, strict=True):
        assert_close(got, want, "loss or gradient")


def test_close_in_bfloat16() -> None:
    model, plain = pair("mask2former")
    model, plain = model.float().train(), plain.float().train()
    losses = []
    for each in (model, plain):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(each(batch((64, 96))))
    for name, want in losses[1].items():
        assert losses[0][name].dtype == torch.float32
        if name.endswith("_0") or name == "loss_prior":  # later ones see other attention masks
            assert abs(losses[0][name].item() / want.item() - 1) < 0.02, name


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch has no oneDNN",
)
def test_products_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor, and for products of any size; it multiplies float32 alone."""
    products_made: list[int] = []

    def faster() -> bool:
        products_made.append(1)
        return True

    monkeypatch.setattr(products, "onednn_is_faster", faster)
    monkeypatch.setattr(products, "SMALLEST", 1)
    model, plain = (each.float() for each in pair("mask2former"))
    samples = batch((64, 96), (45, 70))
    assert_equal_losses(model, plain, samples)
    trained = len(products_made)
    assert trained > 100
    for each in (model, plain):
        each.eval()
    with torch.no_grad():
        for got, want in zip(model(samples), plain(samples), strict=True):
            assert_close(got["sem_seg"], want["sem_seg"], "scores")
    assert len(products_made) > trained


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("norm", ["", "GN"])
def test_pointwise_convolutions(norm: str, layout: torch.memory_format) -> None:
    for plain in (
        Conv2d(6, 32, 1, bias=not norm, norm=get_norm(norm, 32), activation=torch.relu),
        Conv2d(6, 32, 1, stride=2),
        nn.Conv2d(6, 32, 1),
        nn.Conv2d(6, 32, 3, padding=1),
    ):
        plain = plain.double()
        fast = apply_fast_paths(copy.deepcopy(plain), ["pointwise"])
        results = []
        for conv in (plain, fast):
            x = torch.linspace(-1, 1, 2 * 6 * 5 * 7, dtype=torch.float64).view(2, 6, 5, 7)
            x = x.sin().contiguous(memory_format=layout).requires_grad_()
            y = conv(x)
            y.square().sum().backward()
            results.append([y, x.grad, *(p.grad for p in conv.parameters())])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[torch.float64] * 100)
