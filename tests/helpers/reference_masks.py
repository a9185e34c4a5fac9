"""Weights and numbers of a case of ``fixtures/semask_mask2former``, part by part or whole."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from reference import build_backbone, weights
from semask.checkpoint import convert_state_dict
from semask.modeling import SeMaskSwin
from semask.modeling.heads.mask_classification import MaskClassificationHead
from semask.modeling.heads.prior import PriorSupervision
from semask.modeling.losses import (
    Mask2FormerCriterion,
    Mask2FormerMatcher,
    MaskCriterion,
    MaskFormerCriterion,
    MaskFormerMatcher,
)
from semask.modeling.mask_decoder.base import MaskDecoder
from semask.modeling.mask_decoder.mask2former import Mask2FormerDecoder
from semask.modeling.mask_decoder.maskformer import MaskFormerDecoder
from semask.modeling.pixel_decoder import (
    DeformablePixelDecoder,
    FaPNPixelDecoder,
    FPNPixelDecoder,
    MSFaPNPixelDecoder,
    PixelDecoder,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "semask_mask2former"
CASES = (
    "semask_t_maskformer_ade20k",
    "semask_t_mask2former_ade20k",
    "semask_t_fapn_ade20k",
    "semask_t_msfapn_ade20k",
)
SIZES = ("128x128", "96x160")

# What ``summarize`` keeps of each array: channels and side of the grid.
SUMMARIES = {
    "prior": (24, 16),
    "pred_masks": (25, 16),
    "sem_seg": (24, 16),
}


def load_meta(case: str) -> dict[str, Any]:
    return json.loads((FIXTURES / case / "meta.json").read_text())


def load_arrays(case: str, name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / case / name) as arrays:
        return dict(arrays)


def reference_state_dict(case: str) -> dict[str, Tensor]:
    """The reference's parameters, by the reference's names."""
    meta = load_meta(case)
    arrays = weights.fill_state_dict(meta["state_dict"])
    for first, second in meta.get("shared_tensors", {}).items():
        arrays[first] = arrays[second]
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


@functools.lru_cache(maxsize=1)
def converted_state_dict(case: str) -> dict[str, Tensor]:
    """The reference's parameters by this project's names, for all tests of a case; to read only."""
    return convert_state_dict(reference_state_dict(case))[0]


def load_reference(module: nn.Module, case: str, prefix: str = "") -> nn.Module:
    """Load the reference's parameters strictly, through the conversion of published checkpoints.

    Args:
        module: a part of a model, or a model.
        case: name of the fixture.
        prefix: what a model has in front of the part's names, such as "sem_seg_head.predictor.".
    """
    converted = converted_state_dict(case)
    own = {name[len(prefix) :]: v for name, v in converted.items() if name.startswith(prefix)}
    module.load_state_dict(own)
    return module.eval()


def reference_backbone(case: str, **overrides: Any) -> SeMaskSwin:
    """The case's backbone with the reference's weights, in evaluation mode, float32."""
    backbone = build_backbone(load_meta(case)["backbone"], **overrides)
    load_reference(backbone, case, "backbone.")
    return backbone


PIXEL_DECODERS: dict[str, Callable[..., PixelDecoder]] = {
    "BasePixelDecoder": FPNPixelDecoder,
    "MSDeformAttnPixelDecoder": DeformablePixelDecoder,
    "PixelFANDecoder": FaPNPixelDecoder,
    "MSDeformAttnPixelFANDecoder": MSFaPNPixelDecoder,
}


def build_pixel_decoder(case: str) -> PixelDecoder:
    """The case's pixel decoder from plain arguments, without the reference's weights."""
    meta = load_meta(case)
    head = meta["head"]
    return PIXEL_DECODERS[head["pixel_decoder"]](
        input_shape={
            f"res{stage + 2}": ShapeSpec(
                channels=meta["backbone"]["embed_dim"] * 2**stage, stride=4 * 2**stage
            )
            for stage in range(4)
        },
        channels=head["convs_dim"],
        mask_channels=head["mask_dim"],
        norm=head["norm"],
    )


def reference_pixel_decoder(case: str) -> PixelDecoder:
    """The case's pixel decoder with the reference's weights, in evaluation mode, float32."""
    decoder = build_pixel_decoder(case)
    load_reference(decoder, case, "sem_seg_head.pixel_decoder.")
    return decoder


def build_mask_decoder(
    case: str, num_classes: int | None = None, dropout: float | None = None
) -> MaskDecoder:
    """The case's mask decoder from plain arguments, without the reference's weights.

    Args:
        case: name of the fixture.
        num_classes: K; None = that of the fixture.
        dropout: of MaskFormer's decoder; None = that of the fixture.
    """
    meta = load_meta(case)
    head = meta["head"]
    sizes: dict[str, Any] = {
        "num_classes": num_classes or meta["num_classes"],
        "num_queries": head["queries"],
        "dim": head["hidden_dim"],
        "num_heads": head["heads"],
        "feedforward_dim": head["feedforward"],
        "mask_dim": head["mask_dim"],
    }
    layers = head["dec_layers_config"]
    if head["type"] == "maskformer":
        coarsest = 8 * meta["backbone"]["embed_dim"]
        dropout = head["dropout"] if dropout is None else dropout
        return MaskFormerDecoder(in_channels=coarsest, num_layers=layers, dropout=dropout, **sizes)
    return Mask2FormerDecoder(num_layers=layers - 1, **sizes)


class Parts(nn.Module):
    """The parts of a case's model by the names that they have in one; random weights.

    Args:
        case: name of the fixture.
        num_classes: K; None = that of the fixture.
        semantic: with semantic layers.
    """

    def __init__(self, case: str, num_classes: int | None = None, semantic: bool = True) -> None:
        super().__init__()
        spec = dict(load_meta(case)["backbone"])
        if not semantic:
            spec |= {"semantic_attention": ["none"] * 4, "semantic_blocks": 0}
        elif num_classes is not None:
            spec["semantic_classes"] = num_classes
        self.backbone = build_backbone(spec)
        self.sem_seg_head = nn.ModuleDict(
            {
                "pixel_decoder": build_pixel_decoder(case),
                "predictor": build_mask_decoder(case, num_classes),
            }
        )


def build_head(case: str, dropout: float | None = None) -> MaskClassificationHead:
    """The case's head from plain arguments, without the reference's weights.

    Args:
        case: name of the fixture.
        dropout: of MaskFormer's decoder; None = the case's.
    """
    meta = load_meta(case)
    spec, loss = meta["head"], meta["loss"]
    class_weight, mask_weight, dice_weight, prior_weight = (
        loss["weights"][name] for name in ("loss_ce", "loss_mask", "loss_dice", "loss_cate")
    )
    weighted = {
        "class_weight": class_weight,
        "mask_weight": mask_weight,
        "dice_weight": dice_weight,
    }
    criterion: MaskCriterion
    if spec["type"] == "maskformer":
        criterion = MaskFormerCriterion(
            matcher=MaskFormerMatcher(**weighted),
            no_object_weight=loss["no_object_weight"],
            **weighted,
        )
    else:
        criterion = Mask2FormerCriterion(
            matcher=Mask2FormerMatcher(num_points=loss["points"], **weighted),
            no_object_weight=loss["no_object_weight"],
            num_points=loss["points"],
            oversample_ratio=loss["oversample_ratio"],
            importance_sample_ratio=loss["importance_sample_ratio"],
            **weighted,
        )
    return MaskClassificationHead(
        pixel_decoder=build_pixel_decoder(case),
        predictor=build_mask_decoder(case, dropout=dropout),
        criterion=criterion,
        memory="res5" if spec["type"] == "maskformer" else None,
        prior_supervision=PriorSupervision(
            strides={f"prior{stage + 2}": 4 * 2**stage for stage in range(4)},
            num_classes=meta["num_classes"],
            weight=prior_weight,
            reduction="valid",
            align_corners=True,
        ),
    )


def reference_head(case: str, dropout: float | None = None) -> MaskClassificationHead:
    """The case's head with the reference's weights, in evaluation mode, float32."""
    head = build_head(case, dropout)
    load_reference(head, case, "sem_seg_head.")
    return head


def reference_image(case: str, file: str) -> Tensor:
    """The normalised image (or batch of images) of a file, float32."""
    spec = load_meta(case)["files"][file]["image"]
    image = weights.make_image(spec["batch"], spec["height"], spec["width"], seed=spec["seed"])
    return torch.from_numpy(image)


def check_array(case: str, file: str, name: str, array: Tensor) -> None:
    """Compare an NCHW array with the summary that a file has of it.

    In float64 within 1e-6 of the array's scale (its largest absolute value), in float32 within
    ten times the rounding that the reference itself has there.
    """
    expected = load_arrays(case, file)
    scale = expected[f"{name}.stats"][2]
    tolerance = 1e-6 * scale
    if array.dtype == torch.float32:
        tolerance = 10 * load_meta(case)["float32_max_abs_diff"][file][name]
    channels, side = SUMMARIES.get(name, (16, 8))
    got = weights.summarize(name, array.detach().double().numpy(), channels, side)
    for key, value in got.items():
        if key.endswith(".shape"):
            assert np.array_equal(value, expected[key]), key
        elif key.endswith(".stats"):
            assert np.allclose(value, expected[key], rtol=0, atol=tolerance), key
        else:
            error = np.abs(value.astype(np.float64) - expected[key]).max()
            rounding = 1e-7 * scale  # the grids are stored in float32
            assert error <= tolerance + rounding, f"{name}: {key} differs by {error:.2e}"
