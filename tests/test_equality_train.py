"""Losses, gradients and BatchNorm statistics of the reference's training steps."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import CASES, build_reference, load_arrays, load_meta, weights
from semask.checkpoint import convert_state_dict
from semask.errors import ConfigError
from semask.modeling import SegmentationLoss

FILE = "train_128x128_b2.npz"


def inputs(case: str) -> tuple[Tensor, Tensor]:
    entry = load_meta(case)["files"][FILE]
    image, labels = entry["image"], entry["labels"]
    return (
        torch.from_numpy(
            weights.make_image(image["batch"], image["height"], image["width"], seed=image["seed"])
        ).double(),
        torch.from_numpy(
            weights.make_labels(
                labels["batch"],
                labels["height"],
                labels["width"],
                labels["num_classes"],
                seed=labels["seed"],
            )
        ),
    )


def training_model(case: str, dtype: torch.dtype) -> Any:
    """Train mode without dropout and stochastic depth; BatchNorm in evaluation mode."""
    model = build_reference(case, drop_path_rate=0.0, dropout=0.0).to(dtype).train()
    set_batch_norm(model, training=False)
    return model


def set_batch_norm(model: Any, training: bool) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(training)


def own_name(reference_name: str, case: str) -> str:
    numbers = {name: torch.tensor(i) for i, name in enumerate(load_meta(case)["state_dict"])}
    converted, _ = convert_state_dict(numbers)
    return next(name for name, i in converted.items() if i == numbers[reference_name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_statistics_equal_reference(case: str, dtype: torch.dtype) -> None:
    expected = load_arrays(case, FILE)
    image, labels = inputs(case)
    image = image.to(dtype)
    model = training_model(case, dtype)
    compared = {"pixels_total", "pixels_valid"}
    rtol, atol = (1e-6, 1e-9) if dtype == torch.float64 else (1e-3, 1e-4)

    def close(key: str, value: Any, atol: float = atol) -> None:
        if isinstance(value, Tensor):
            value = value.detach().numpy()
        np.testing.assert_allclose(value, expected[key], rtol=rtol, atol=atol, err_msg=key)
        compared.add(key)

    assert labels.numel() == expected["pixels_total"]
    assert (labels != 255).sum() == expected["pixels_valid"]

    head = model.sem_seg_head
    features = model.backbone(image)
    losses = head.losses(features, {"sem_seg": labels})
    total = sum(losses.values())
    logits = torch.nn.functional.interpolate(
        head.predict(features)["logits"], size=labels.shape[-2:], mode="bilinear"
    )
    accuracy = 100 * (logits.argmax(1) == labels).sum() / labels.numel()
    one_pixel = 100 / labels.numel()  # two classes may be equal to float32 rounding
    close("accuracy_percent", accuracy, atol=1e-9 if dtype == torch.float64 else 3 * one_pixel)
    close("loss", total)
    close("loss_ce", losses["loss_sem_seg"])
    if "loss_prior" in losses:
        close("loss_cate", losses["loss_prior"])

    total.backward()
    parameters = dict(model.named_parameters())
    names = [key.split(":", 1)[1] for key in expected if key.startswith("grad_norm:")]
    for name in names:
        gradient = parameters[own_name(name, case)].grad
        close(f"grad_norm:{name}", gradient.norm())
        close(f"grad_head:{name}", gradient.flatten()[:32])
    close("grad_norm_all", norm(parameters.values()))
    close("grad_norm_backbone", norm(model.backbone.parameters()))

    with torch.no_grad():
        for pixels in (2000, 100000):
            if f"ohem{pixels}.loss_ce" not in expected:
                continue
            head.loss.ohem_pixels = pixels
            mined = head.losses(features, {"sem_seg": labels})
            close(f"ohem{pixels}.loss_ce", mined["loss_sem_seg"])
            if f"ohem{pixels}.loss" in expected:
                close(f"ohem{pixels}.loss_cate", mined["loss_prior"])
                close(f"ohem{pixels}.loss", sum(mined.values()))
        head.loss.ohem_pixels = 0

        set_batch_norm(model, training=True)
        close(
            "bn_train.loss", sum(head.losses(model.backbone(image), {"sem_seg": labels}).values())
        )
        state = model.state_dict()
        for key in expected:
            if key.startswith("bn_train.running"):
                statistic, name = key.split(".", 1)[1].split(":")
                own = own_name(f"{name}.{statistic}", case)
                close(key, state[own][:32])
    assert compared == set(expected)


def norm(parameters: Any) -> Tensor:
    return torch.stack([p.grad.norm() for p in parameters]).norm()


def test_valid_reduction_divides_by_the_valid_pixels() -> None:
    logits = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 6, 6))
    target[0, :3] = 255
    valid = int((target != 255).sum())
    summed = torch.nn.functional.cross_entropy(logits, target, ignore_index=255, reduction="sum")
    assert torch.allclose(SegmentationLoss(reduction="valid")(logits, target), summed / valid)
    assert torch.allclose(SegmentationLoss(reduction="all")(logits, target), summed / 72)


@pytest.mark.parametrize("reduction", ["all", "valid"])
@pytest.mark.parametrize("ohem_pixels", [0, 10])
def test_all_ignored_batch_gives_zero_and_zero_gradient(reduction: str, ohem_pixels: int) -> None:
    logits = torch.randn(2, 4, 6, 6, requires_grad=True)
    target = torch.full((2, 12, 12), 255)
    loss = SegmentationLoss(reduction=reduction, ohem_pixels=ohem_pixels)(logits, target)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_ohem_keeps_the_hardest_valid_pixels() -> None:
    logits = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 6, 6))
    target[1, 2:] = 255
    each = torch.nn.functional.cross_entropy(logits, target, ignore_index=255, reduction="none")
    hardest = each[target != 255].sort(descending=True).values[:20]
    assert torch.allclose(SegmentationLoss(ohem_pixels=10)(logits, target), hardest.sum() / 72)
    assert torch.allclose(
        SegmentationLoss(ohem_pixels=10, reduction="valid")(logits, target), hardest.mean()
    )


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ConfigError, match="LOSS_REDUCTION"):
        SegmentationLoss(reduction="mean")


def test_losses_are_float32_under_half_precision() -> None:
    logits = torch.randn(1, 4, 6, 6).bfloat16()
    loss = SegmentationLoss()(logits, torch.randint(0, 4, (1, 12, 12)))
    assert loss.dtype == torch.float32
