"""Builds the model of a case of ``fixtures/semask_fpn``, with the reference's weights."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from semask.checkpoint import convert_state_dict
from semask.modeling import PriorSupervision, SemanticFPNDecoder, SeMaskFPNHead, SeMaskSwin

FIXTURES = Path(__file__).parents[1] / "fixtures" / "semask_fpn"
CASES = ("semask_t_ade20k", "semask_l_cityscapes", "swin_t_ade20k")


def load_weights_module() -> Any:
    spec = importlib.util.spec_from_file_location("fixture_weights", FIXTURES / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


weights = load_weights_module()


def load_meta(case: str) -> dict[str, Any]:
    return json.loads((FIXTURES / case / "meta.json").read_text())


def load_arrays(case: str, name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / case / name) as arrays:
        return dict(arrays)


def reference_state_dict(case: str) -> dict[str, torch.Tensor]:
    """The reference's parameters, by the reference's names."""
    shapes = load_meta(case)["state_dict"]
    return {k: torch.from_numpy(v) for k, v in weights.fill_state_dict(shapes).items()}


@functools.lru_cache(maxsize=1)
def converted_state_dict(case: str) -> dict[str, torch.Tensor]:
    """The reference's parameters by this project's names, for all tests of a case; to read only."""
    return convert_state_dict(reference_state_dict(case))[0]


def build_backbone(spec: dict[str, Any], **overrides: Any) -> SeMaskSwin:
    """The backbone that a fixture's ``meta.json`` describes under "backbone"."""
    return SeMaskSwin(
        embed_dim=spec["embed_dim"],
        depths=spec["depths"],
        num_heads=spec["num_heads"],
        window_size=spec["window_size"],
        drop_path_rate=overrides.get("drop_path_rate", spec["drop_path_rate"]),
        semantic_attention=spec.get("semantic_attention", ["none"] * 4),
        semantic_blocks=stage_blocks(spec),
        semantic_classes=spec.get("semantic_classes", 0),
        semantic_window_size=spec.get("semantic_window_size"),
        semantic_dropout=overrides.get("dropout", spec.get("semantic_dropout", 0.0)),
    )


def stage_blocks(spec: dict[str, Any]) -> list[int]:
    """Semantic blocks of each stage; one number stands for all stages."""
    blocks = spec.get("semantic_blocks", 0)
    return [blocks] * 4 if isinstance(blocks, int) else blocks


class Model(nn.Module):
    """Backbone and head without Detectron2's input handling; built from plain arguments."""

    def __init__(self, case: str, **overrides: Any) -> None:
        super().__init__()
        meta = load_meta(case)
        spec = meta["backbone"]
        self.backbone = build_backbone(spec, **overrides)
        head = meta["head"]
        self.sem_seg_head = SeMaskFPNHead(
            semantic_fpn=SemanticFPNDecoder(
                input_shape={
                    f"res{i + 2}": ShapeSpec(channels=channels, stride=stride)
                    for i, (channels, stride) in enumerate(
                        zip(head["in_channels"], head["feature_strides"], strict=True)
                    )
                },
                num_classes=head["num_classes"],
                conv_dims=head["channels"],
                dropout=overrides.get("dropout", head["dropout_ratio"]),
                norm="BN",
            ),
            prior_supervision=(
                PriorSupervision(
                    strides=self.backbone.prior_strides,
                    num_classes=head["num_classes"],
                    weight=head["prior_loss_weight"],
                )
                if "semantic_attention" in spec
                else None
            ),
            num_classes=head["num_classes"],
        )


def build_reference(case: str, **overrides: Any) -> Model:
    """The case's model with the reference's weights, in evaluation mode, float32."""
    model = Model(case, **overrides).eval()
    missing, unexpected = model.load_state_dict(converted_state_dict(case), strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    return model
