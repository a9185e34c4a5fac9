"""The loss in stripes equals the plain one, in value and gradient."""

import pytest
import torch
from torch import Tensor

from semask.modeling import SegmentationLoss
from semask.ops import stripes
from semask.ops.striped_loss import StripedSegmentationLoss

# (height, width) of the logits and of the labels: whole factors, odd sizes, none, smaller, 1 x 1.
SIZES = [
    ((8, 8), (32, 32)),
    ((7, 9), (25, 33)),
    ((16, 5), (16, 5)),
    ((12, 9), (7, 8)),
    ((1, 1), (5, 6)),
]
Case = tuple[tuple[int, int], tuple[int, int]]


def case(sizes: Case, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, classes, *sizes[0], dtype=dtype)).requires_grad_()
    target = torch.randint(classes, (3, *sizes[1]))
    target[0, : sizes[1][0] // 2] = 255
    target[1] = 255  # an image without any label
    return logits, target


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("reduction", ["all", "valid"])
@pytest.mark.parametrize("ohem_pixels", [0, 7])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_plain_form(
    sizes: Case,
    classes: int,
    reduction: str,
    ohem_pixels: int,
    align_corners: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    logits, target = case(sizes, classes, dtype)
    plain, striped = (
        form(reduction=reduction, ohem_pixels=ohem_pixels, align_corners=align_corners)(
            logits, target
        )
        for form in (SegmentationLoss, StripedSegmentationLoss)
    )
    assert plain > 0
    torch.testing.assert_close(striped, plain, rtol=tolerance, atol=0)
    expected, gradient = (torch.autograd.grad(2 * loss, logits)[0] for loss in (plain, striped))
    scale = float(expected.abs().max())
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance * scale)


def test_height_of_the_stripes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = case(((7, 9), (25, 33)), 5, torch.float64)
    whole = StripedSegmentationLoss()(logits, target)
    monkeypatch.setitem(stripes.STRIPE_BYTES, "cpu", 1)  # one row each
    rows = StripedSegmentationLoss()(logits, target)
    torch.testing.assert_close(rows, whole, rtol=1e-12, atol=0)
    pairs = [torch.autograd.grad(loss, logits)[0] for loss in (rows, whole)]
    torch.testing.assert_close(*pairs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", [SegmentationLoss, StripedSegmentationLoss])
def test_certain_mistakes_have_finite_losses(form: type[SegmentationLoss]) -> None:
    """The probability of the label is 0 in float32, its logarithm is not needed."""
    logits = torch.tensor([500.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    loss = form()(logits, torch.ones(1, 2, 2, dtype=torch.long))
    assert loss.item() == pytest.approx(500)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([1.0, -1.0]))


def test_nothing_labelled_is_0() -> None:
    logits, target = case(SIZES[0], 3, torch.float32)
    target[:] = 255
    for reduction in ("all", "valid"):
        loss = StripedSegmentationLoss(reduction=reduction)(logits, target)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_half_precision_is_summed_in_float32() -> None:
    logits, target = case(SIZES[0], 3, torch.float32)
    half = logits.detach().bfloat16().requires_grad_()
    loss = StripedSegmentationLoss()(half, target)
    assert loss.dtype == torch.float32
    plain = SegmentationLoss()(half, target)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, half)
    assert gradient.dtype == torch.bfloat16


def test_without_gradients() -> None:
    logits, target = case(SIZES[1], 3, torch.float64)
    with torch.no_grad():
        striped = StripedSegmentationLoss()(logits, target)
    torch.testing.assert_close(striped, SegmentationLoss()(logits, target).detach())


def test_corners_that_are_aligned_are_resized_as_a_whole() -> None:
    logits, target = case(SIZES[1], 3, torch.float64)
    plain, striped = (
        form(reduction="valid", align_corners=True)(logits, target)
        for form in (SegmentationLoss, StripedSegmentationLoss)
    )
    assert torch.equal(plain, striped)
    assert plain != SegmentationLoss(reduction="valid")(logits, target)
