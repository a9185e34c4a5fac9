"""A model with its faster forms equals the plain one: outputs, losses, gradients, statistics."""

import copy
from typing import Any

import pytest
import torch

from plain_comparison import (
    assert_close,
    assert_equal_gradients,
    assert_equal_predictions,
    assert_equal_training,
    batch,
    config,
    pair,
)
from semask.modeling import SegmentationLoss
from semask.ops.striped_loss import StripedSegmentationLoss

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
WINDOW, GLOBAL, NONE = "window", "global", "none"


pytestmark = pytest.mark.usefixtures("one_thread")


PATTERNS = [
    (WINDOW, WINDOW, GLOBAL, GLOBAL),
    (WINDOW, WINDOW, WINDOW, WINDOW),
    (WINDOW, WINDOW, WINDOW, GLOBAL),
    (GLOBAL, GLOBAL, GLOBAL, GLOBAL),
    (NONE, NONE, NONE, NONE),
    (NONE, WINDOW, NONE, GLOBAL),
    (GLOBAL, NONE, WINDOW, NONE),
]


@DTYPES
@pytest.mark.parametrize("attention", PATTERNS, ids="-".join)
def test_equal_for_every_pattern_of_attention(
    attention: tuple[str, ...], dtype: torch.dtype
) -> None:
    model, plain = pair(config(SEMASK__ATTENTION=list(attention)), dtype)
    samples = batch((53, 75), (53, 75), ignored=(1,))
    assert_equal_predictions(model, plain, samples)
    assert_equal_training(model, plain, samples)
    assert_equal_training(model, plain, samples, batch_norm=False)


@DTYPES
@pytest.mark.parametrize(
    "sizes",
    [
        [(64, 96)],
        [(33, 47), (33, 47), (33, 47)],
        [(90, 31)],
        [(5, 130)],
        [(50, 61), (37, 64)],  # padded to one size in training
    ],
    ids=str,
)
def test_equal_for_every_size(sizes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    model, plain = pair(config(), dtype)
    samples = batch(*sizes)
    assert_equal_predictions(model, plain, samples)
    # BatchNorm over a single position has no variance to divide by.
    assert_equal_training(model, plain, samples, batch_norm=min(min(sizes)) > 32)


@DTYPES
@pytest.mark.parametrize(
    "overrides",
    [
        {"SEMASK__NUM_BLOCKS": [2, 3, 2, 1]},
        {"SEMASK__NUM_BLOCKS": [1, 0, 2, 0]},
        {"SEMASK__WINDOW_SIZE": 3},
        {"SWIN__WINDOW_SIZE": 5, "SEMASK__WINDOW_SIZE": 2},
        {"SWIN__WINDOW_SIZE": 7, "SWIN__DEPTHS": [1, 3, 2, 2]},
        {"SWIN__NUM_HEADS": [2, 4, 8, 16], "SWIN__MLP_RATIO": 2.5},
        {"SEM_SEG_HEAD__PRIOR_LOSS_WEIGHT": 1.5, "SEM_SEG_HEAD__LOSS_WEIGHT": 0.7},
    ],
    ids=lambda overrides: " ".join(f"{key}={value}" for key, value in overrides.items()),
)
def test_equal_for_other_shapes(overrides: dict[str, Any], dtype: torch.dtype) -> None:
    model, plain = pair(config(**overrides), dtype)
    samples = batch((53, 75), (53, 75))
    assert_equal_predictions(model, plain, samples)
    assert_equal_training(model, plain, samples)


@DTYPES
@pytest.mark.parametrize("classes", [2, 19, 1000])
def test_equal_for_few_and_many_classes(classes: int, dtype: torch.dtype) -> None:
    model, plain = pair(config(SEM_SEG_HEAD__NUM_CLASSES=classes), dtype)
    # 255 is the ignore value, also where there are more classes than that.
    samples = batch((45, 58), (45, 58), classes=min(classes, 255), ignored=(0,))
    assert_equal_predictions(model, plain, samples)
    assert_equal_training(model, plain, samples)


@DTYPES
@pytest.mark.parametrize("ignored", [(), (1,), (0, 1)], ids=["some", "an image", "all"])
@pytest.mark.parametrize("ohem", [0, 100, 1500, 100000])
@pytest.mark.parametrize("reduction", ["all", "valid"])
def test_equal_losses(
    reduction: str, ohem: int, ignored: tuple[int, ...], dtype: torch.dtype
) -> None:
    cfg = config(
        SEM_SEG_HEAD__LOSS_REDUCTION=reduction,
        SEM_SEG_HEAD__OHEM_PIXELS=ohem,
        SWIN__DEPTHS=[1, 1],
        SWIN__NUM_HEADS=[1, 1],
        SWIN__OUT_FEATURES=["res2", "res3"],
        SWIN__ACTIVATION_CHECKPOINT=[False, False],
        SEMASK__ATTENTION=[WINDOW, GLOBAL],
        SEMASK__NUM_BLOCKS=[1, 1],
        SEM_SEG_HEAD__IN_FEATURES=["res2", "res3"],
    )
    model, plain = pair(cfg, dtype)
    assert_equal_training(model, plain, batch((41, 55), (41, 55), ignored=ignored))


@DTYPES
@pytest.mark.parametrize("ohem", [0, 60])
@pytest.mark.parametrize("reduction", ["all", "valid"])
@pytest.mark.parametrize(
    ("size", "target_size"),
    [
        ((7, 9), (28, 36)),
        ((7, 9), (26, 35)),
        ((7, 9), (7, 9)),
        ((7, 9), (50, 23)),
        ((9, 8), (5, 6)),
        ((1, 3), (16, 1)),
    ],
    ids=str,
)
def test_equal_loss_function(
    size: tuple[int, int],
    target_size: tuple[int, int],
    reduction: str,
    ohem: int,
    dtype: torch.dtype,
) -> None:
    classes = 5
    logits = 3 * torch.randn(3, classes, *size, dtype=dtype)
    target = torch.randint(0, classes, (3, *target_size))
    target[torch.rand(target.shape) < 0.3] = 255
    target[2] = 255
    gradients, losses = [], []
    for form in (StripedSegmentationLoss, SegmentationLoss):
        leaf = logits.clone().requires_grad_()
        loss = form(reduction=reduction, ohem_pixels=ohem)(leaf, target)
        (2.5 * loss).backward()
        assert leaf.grad is not None
        losses.append(loss)
        gradients.append(leaf.grad)
    assert_close(losses[0], losses[1], "loss")
    assert_close(gradients[0], gradients[1], "gradient")


def test_equal_loss_of_channels_last_and_cut_logits() -> None:
    target = torch.randint(0, 4, (2, 24, 32))
    for maps in (
        torch.randn(2, 4, 6, 8, dtype=torch.float64).to(memory_format=torch.channels_last),
        torch.randn(2, 9, 12, 8, dtype=torch.float64)[:, 1:5, ::2],
    ):
        leaf, other = maps.detach().requires_grad_(), maps.clone().requires_grad_()
        StripedSegmentationLoss()(leaf, target).backward()
        SegmentationLoss()(other, target).backward()
        assert leaf.grad is not None
        assert other.grad is not None
        assert_close(leaf.grad, other.grad, "gradient")


# ---- what is prepared or kept in evaluation follows the weights, the size and the mode ----


def test_predictions_follow_the_weights_and_the_size() -> None:
    model, plain = pair(config(), torch.float64)
    samples = batch((53, 75), (64, 64))
    assert_equal_predictions(model, plain, samples)
    for each in (model, plain):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.mul_(0.9)
    assert_equal_predictions(model, plain, samples)
    state = {name: value * 1.1 for name, value in plain.state_dict().items()}
    for each in (model, plain):
        each.load_state_dict(state)
    assert_equal_predictions(model, plain, batch((64, 64), (40, 90)))


def test_predictions_follow_an_optimizer_step() -> None:
    model, plain = pair(config(), torch.float64)
    samples = batch((53, 75), (53, 75))
    assert_equal_predictions(model, plain, samples)
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-2) for each in (model, plain)]
    for _ in range(2):
        assert_equal_training(model, plain, samples)
        for optimizer in optimizers:
            optimizer.step()
        assert_equal_predictions(model, plain, samples)


def test_predictions_follow_the_type_and_a_copy() -> None:
    model, plain = pair(config(), torch.float64)
    samples = batch((53, 75))
    names = list(model.state_dict())
    assert_equal_predictions(model, plain, samples)
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal_predictions(copied, plain, samples)
    assert_equal_predictions(copied.float(), plain.float(), samples)


@DTYPES
def test_equal_gradients_in_evaluation_mode(dtype: torch.dtype) -> None:
    model, plain = pair(config(), dtype)
    samples = batch((53, 75))
    with torch.inference_mode():
        model.eval()(samples)  # what this leaves behind must not be in the way
    pulls = torch.randn(6, 62, 72, dtype=dtype)
    for each in (model, plain):
        each.eval()
        each.zero_grad()
        (each(samples)[0]["sem_seg"] * pulls).sum().backward()
    assert_equal_gradients(model, plain)


def test_close_in_bfloat16() -> None:
    model, plain = pair(config(), torch.float32)
    samples = batch((53, 75), (53, 75))
    want = plain.train()(samples)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.train()(samples)
    for name in want:
        assert got[name].dtype == torch.float32
        assert abs(got[name].item() / want[name].item() - 1) < 0.02, name
