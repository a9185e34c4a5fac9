"""Other projects' implementations of comparable models, where they are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], None]
Sample = dict[str, Any]

# {side of a case: the package it needs}
PACKAGES = {"transformers": "transformers"}


def missing(side: str) -> str | None:
    """Why a side cannot be measured here; None if it can, or needs nothing."""
    package = PACKAGES.get(side)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: `pip install {package}` adds its figures"


def prepare_peer(kind: str, samples: list[Sample], classes: int) -> Step:
    """transformers' Mask2Former with Swin-T and random weights; what is returned runs it once.

    Args:
        kind: "inference" (to the class scores of all pixels) or "training" (a step with AdamW).
        samples: as the project's models take them, of one size.
        classes: K.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=classes)
    model = Mask2FormerForUniversalSegmentation(config)
    pixels = torch.stack([sample["image"].float() for sample in samples]).sub(120).div(60)
    if kind == "inference":
        return _inference(model.eval(), pixels)
    return _training(model.train(), pixels, [sample["sem_seg"] for sample in samples])


def _inference(model: nn.Module, pixels: Tensor) -> Step:
    def step() -> None:
        with torch.inference_mode():
            output = model(pixel_values=pixels)
            masks = F.interpolate(
                output.masks_queries_logits, size=pixels.shape[-2:], mode="bilinear"
            )
            probabilities = output.class_queries_logits.softmax(dim=-1)[..., :-1]
            torch.einsum("bqc,bqhw->bchw", probabilities, masks.sigmoid())

    return step


def _training(model: nn.Module, pixels: Tensor, labels: list[Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    classes = [label[label != 255].unique() for label in labels]
    masks = [
        (label[None] == own[:, None, None]).float()
        for label, own in zip(labels, classes, strict=True)
    ]

    def step() -> None:
        optimizer.zero_grad()
        output = model(pixel_values=pixels, mask_labels=masks, class_labels=classes)
        output.loss.backward()
        optimizer.step()

    return step
