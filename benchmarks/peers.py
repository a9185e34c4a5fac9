"""Comparable models of other projects, if they are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], None]
Sample = dict[str, Any]

# {side of a case: the package it needs}
PACKAGES = {
    "transformers": "transformers",
    "segformer-b1": "transformers",
    "segformer-b2": "transformers",
    "smp fpn swin-t": "segmentation_models_pytorch",
}
# Depths and the decoder's width of transformers' SegFormers.
SEGFORMERS = {"segformer-b1": ([2, 2, 2, 2], 256), "segformer-b2": ([3, 4, 6, 3], 768)}


def missing(side: str) -> str | None:
    """The reason why a side cannot be measured here; None if it can."""
    package = PACKAGES.get(side)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: `pip install {package}` adds its figures"


def prepare_peer(side: str, kind: str, samples: list[Sample], classes: int) -> Step:
    """Build a peer's model with random weights; returns a function that runs it once.

    Args:
        side: a key of ``PACKAGES``.
        kind: "inference" (to the scores of all pixels) or "training" (a step with AdamW).
        samples: inputs of the project's models, of one size.
        classes: K.
    """
    pixels = torch.stack([sample["image"].float() for sample in samples]).sub(120).div(60)
    labels = [sample["sem_seg"] for sample in samples]
    if side == "transformers":
        return _mask2former(kind, pixels, labels, classes)
    network = _segformer(side, classes) if side in SEGFORMERS else _smp_fpn(pixels, classes)
    return _per_pixel(network, kind, pixels, torch.stack(labels))


def _segformer(side: str, classes: int) -> nn.Module:
    """transformers' SegFormer, to logits at stride 4."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    depths, width = SEGFORMERS[side]
    config = SegformerConfig(
        depths=depths,
        hidden_sizes=[64, 128, 320, 512],
        decoder_hidden_size=width,
        num_labels=classes,
    )
    return _Logits(SegformerForSemanticSegmentation(config))


class _Logits(nn.Module):
    """The logits of a model of transformers, as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits


def _smp_fpn(pixels: Tensor, classes: int) -> nn.Module:
    """segmentation_models_pytorch's FPN with timm's Swin-T, to logits at stride 1."""
    import segmentation_models_pytorch as smp

    network: nn.Module = smp.FPN(
        "tu-swin_tiny_patch4_window7_224",
        encoder_weights=None,
        classes=classes,
        img_size=tuple(pixels.shape[-2:]),
    )
    return network


def _per_pixel(network: nn.Module, kind: str, pixels: Tensor, labels: Tensor) -> Step:
    """Logits of the image's size; in training with cross entropy, as these peers do."""
    network.train(kind == "training")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05)

    def logits() -> Tensor:
        return F.interpolate(network(pixels), size=pixels.shape[-2:], mode="bilinear")

    def infer() -> None:
        with torch.inference_mode():
            logits()

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits(), labels, ignore_index=255).backward()
        optimizer.step()

    return train if kind == "training" else infer


def _mask2former(kind: str, pixels: Tensor, labels: list[Tensor], classes: int) -> Step:
    """transformers' Mask2Former with Swin-T."""
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
    if kind == "inference":
        return _inference(model.eval(), pixels)
    return _training(model.train(), pixels, labels)


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
