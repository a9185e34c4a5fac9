"""Names of published checkpoints."""

import re

import numpy as np
import pytest
import torch

from reference import CASES, FIXTURES, load_meta, reference_state_dict, weights
from semask.checkpoint import CheckpointKind, convert_state_dict, resize_bias_tables
from semask.config.loading import load_config
from semask.errors import CheckpointError
from semask.modeling import SeMaskSwin

KINDS = {
    "semask_t_ade20k": CheckpointKind.SEMASK_FPN,
    "semask_l_cityscapes": CheckpointKind.SEMASK_FPN,
    "swin_t_ade20k": CheckpointKind.SWIN_FPN,
}
CONFIGS = {
    "semask_t_ade20k": "configs/ade20k/semask_swin_tiny_fpn.yaml",
    "semask_l_cityscapes": "configs/cityscapes/semask_swin_large_fpn.yaml",
    "swin_t_ade20k": "configs/ade20k/swin_tiny_fpn.yaml",
}


def meta_model(config: str) -> torch.nn.Module:
    from detectron2.modeling import build_model

    cfg = load_config(config, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("case", CASES)
def test_published_names_become_exactly_those_of_the_config(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FIXTURES.parents[2])
    shapes = load_meta(case)["state_dict"]
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    converted, kind = convert_state_dict(published)
    assert kind is KINDS[case]
    expected = meta_model(CONFIGS[case]).state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}


def imagenet_names(case: str) -> dict[str, torch.Tensor]:
    """The case's Swin as the Swin authors publish it: no prefix, one norm, a classifier."""
    names = {
        name.removeprefix("backbone."): torch.zeros(shape)
        for name, shape in load_meta(case)["state_dict"].items()
        if name.startswith("backbone.") and not name.startswith("backbone.norm")
    }
    return {
        **names,
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
        "norm.weight": torch.zeros(768),
        "head.weight": torch.zeros(1000, 768),
    }


def test_imagenet_swin_leaves_its_classifier_and_lacks_what_is_new() -> None:
    converted, kind = convert_state_dict(imagenet_names("swin_t_ade20k"))
    assert kind is CheckpointKind.IMAGENET_SWIN
    backbone = SeMaskSwin(semantic_classes=150)
    expected = {f"backbone.{name}" for name in backbone.state_dict()}
    assert set(converted) - expected == {"norm.weight", "head.weight"}
    missing = expected - set(converted)
    assert missing
    assert all(".semantic_layers." in name or ".output_norms." in name for name in missing)


def test_own_names_and_a_parallel_wrapper_are_recognised() -> None:
    state = {f"backbone.{k}": v for k, v in SeMaskSwin(semantic_classes=3).state_dict().items()}
    assert convert_state_dict(state) == (state, CheckpointKind.NATIVE)
    reference = reference_state_dict("swin_t_ade20k")
    wrapped = {f"module.{name}": value for name, value in reference.items()}
    assert set(convert_state_dict(wrapped)[0]) == set(convert_state_dict(reference)[0])


def test_what_this_project_wrote_before_the_encoder_was_a_part_of_its_own() -> None:
    backbone = SeMaskSwin(semantic_classes=3, absolute_pos_embed=True)
    for prefix in ("backbone.", "backbone.bottom_up."):
        former, expected = {}, {}
        for name, value in backbone.state_dict().items():
            expected[prefix + name] = value
            was = name.replace("encoder.stem.", "").replace("encoder.", "")
            was = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"merging.{int(m[1]) - 1}", was)
            was = re.sub(
                r"^semantic_layers\.res(\d)",
                lambda m: f"stages.{int(m[1]) - 2}.semantic_layer",
                was,
            )
            former[prefix + was] = value
        head = {"sem_seg_head.semantic_fpn.predictor.weight": torch.zeros(1)}
        assert {
            "patch_embed.proj.weight",
            "absolute_pos_embed",
            "stages.0.blocks.0.attn.qkv.weight",
            "stages.3.semantic_layer.blocks.0.gamma",
            "merging.2.reduction.weight",
            "output_norms.res5.weight",
        } <= {name.removeprefix(prefix) for name in former}
        assert convert_state_dict(former | head) == (expected | head, CheckpointKind.NATIVE)


def test_foreign_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no known kind.*conv1\.weight"):
        convert_state_dict({"conv1.weight": torch.zeros(1)})


def test_bias_table_is_resized_as_the_reference_does() -> None:
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    table = torch.from_numpy(weights.fill_tensor(key, (169, 3)))
    name = "backbone.encoder.stages.0.blocks.0.attn.relative_position_bias_table"
    resized = resize_bias_tables({name: table}, {name: torch.empty(529, 3)})[name]
    with np.load(FIXTURES / "bias_table_resize.npz") as expected:
        np.testing.assert_allclose(resized.numpy(), expected["resized"], atol=1e-6)


def test_bias_table_for_other_heads_is_left_for_the_loader_to_refuse() -> None:
    name = "backbone.encoder.stages.0.blocks.0.attn.relative_position_bias_table"
    table = torch.zeros(169, 3)
    assert resize_bias_tables({name: table}, {name: torch.empty(529, 4)})[name] is table


def test_absolute_position_embedding_becomes_a_grid() -> None:
    name = "backbone.encoder.stem.absolute_pos_embed"
    tokens = torch.randn(1, 16, 8)
    same = resize_bias_tables({name: tokens}, {name: torch.empty(1, 8, 4, 4)})[name]
    torch.testing.assert_close(same.flatten(2).transpose(1, 2), tokens)
    larger = resize_bias_tables({name: tokens}, {name: torch.empty(1, 8, 6, 6)})[name]
    assert larger.shape == (1, 8, 6, 6)


@pytest.mark.parametrize(
    ("library", "names"),
    [
        ("transformers", ["swin.encoder.layers.0.blocks.0.attention.self.query.weight"]),
        ("torchvision", ["features.0.0.weight", "features.1.0.attn.qkv.weight"]),
        (
            "timm",
            ["layers.0.blocks.0.attn.qkv.weight", "layers.1.downsample.reduction.weight"],
        ),
    ],
)
def test_a_swin_of_another_library_is_named(library: str, names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=library):
        convert_state_dict({name: torch.zeros(1) for name in names})
