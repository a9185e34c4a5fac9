"""SeMask works with any encoder that implements the interface: here a small channels-first
ConvNet.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from torch import Tensor, nn

from semask.config import load_config
from semask.errors import ConfigError
from semask.modeling import (
    HierarchicalEncoder,
    SemanticAttention,
    SemanticLayer,
    SeMaskBackbone,
    SeMaskFPNHead,
    SeMaskSegmentor,
    SeMaskSwin,
)
from semask.modeling.backbone.contract import SemSegBackbone
from semask.ops.apply import FAST_PATHS, apply_fast_paths
from tiny_instances import SMALL_MODEL, flat

CLASSES = 4


class ConvEncoder(HierarchicalEncoder):
    """Stages of one convolution; those behind the first halve the map themselves, if at all."""

    layout = "NCHW"

    def __init__(self, strides: Sequence[int] = (2, 4, 8), norm: bool = False) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.channels = tuple(6 + 2 * stage for stage in range(len(strides)))
        self.stem = nn.Conv2d(3, 6, 3, stride=strides[0], padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=step, padding=1),
                nn.BatchNorm2d(after, momentum=0.3) if norm else nn.Identity(),
                nn.Dropout(0.2),
                nn.GELU(),
            )
            for before, after, step in zip(
                (6, *self.channels),
                self.channels,
                (1, *(after // before for before, after in pairwise(strides))),
                strict=False,
            )
        )


def build(**overrides: Any) -> SeMaskBackbone:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "encoder": ConvEncoder(),
        "semantic_attention": ("window", "none", "global"),
        "semantic_blocks": (2, 1, 1),
        "semantic_classes": CLASSES,
        "semantic_window_size": 3,
        "out_features": ("res2", "res4"),
        "activation_checkpoint": (False, False, False),
    }
    backbone = SeMaskBackbone(**{**settings, **overrides})
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.7)
    return backbone


def gradients(backbone: SeMaskBackbone, image: Tensor) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    torch.stack([out.square().sum() for out in backbone.train()(image).values()]).sum().backward()
    return {name: parameter.grad for name, parameter in backbone.named_parameters()}


def test_features_and_priors() -> None:
    backbone = build().eval()
    shapes = {name: (s.channels, s.stride) for name, s in backbone.output_shape().items()}
    assert shapes == {"res2": (6, 2), "res4": (10, 8)}
    assert backbone.prior_strides == {"prior2": 2, "prior4": 8}
    assert backbone.num_semantic_classes == CLASSES
    outputs = backbone(torch.randn(2, 3, 37, 50), return_priors=True)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "res2": (2, 6, 19, 25),
        "res4": (2, 10, 5, 7),
        "prior2": (2, CLASSES, 19, 25),
        "prior4": (2, CLASSES, 5, 7),
    }
    assert backbone(torch.randn(1, 3, 16, 16)).keys() == {"res2", "res4"}


def test_masked_features_go_to_the_next_stage() -> None:
    backbone = build().eval()
    encoder, image = backbone.encoder, torch.randn(1, 3, 16, 16)
    x = encoder.stages[0](encoder.stem(image))
    masked, prior = backbone.semantic_layers["res2"](x.permute(0, 2, 3, 1))
    x = encoder.stages[2](encoder.stages[1](masked.permute(0, 3, 1, 2)))
    last, _ = backbone.semantic_layers["res4"](x.permute(0, 2, 3, 1))
    outputs = backbone(image, return_priors=True)
    expected = backbone.output_norms["res4"](last).permute(0, 3, 1, 2)
    torch.testing.assert_close(outputs["res4"], expected)
    torch.testing.assert_close(outputs["prior2"], prior.permute(0, 3, 1, 2))


def test_everything_learns() -> None:
    missing = [n for n, g in gradients(build(), torch.randn(2, 3, 32, 40)).items() if g is None]
    assert missing == []


def test_activation_checkpointing_changes_no_gradient() -> None:
    image = torch.randn(2, 3, 33, 40)
    expected = gradients(build(), image)
    found = gradients(build(activation_checkpoint=(True, True, True)), image)
    torch.testing.assert_close(found, expected)


def test_a_recomputed_stage_counts_a_batch_once() -> None:
    image = torch.randn(2, 3, 33, 40)
    plain = build(encoder=ConvEncoder(norm=True), freeze_at=2)
    recomputed = build(
        encoder=ConvEncoder(norm=True), freeze_at=2, activation_checkpoint=(True, True, False)
    )
    recomputed.load_state_dict(plain.state_dict())
    expected = [gradients(plain, image) for _ in range(2)]
    found = [gradients(recomputed, image) for _ in range(2)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dict(recomputed.named_buffers()), dict(plain.named_buffers()))
    norms = [m for m in recomputed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [norm.num_batches_tracked for norm in norms] == [0, 2, 2]


def test_frozen_stages() -> None:
    backbone = build(freeze_at=2)
    frozen = {
        name
        for name, value in gradients(backbone, torch.randn(2, 3, 32, 32)).items()
        if value is None
    }
    names = dict(backbone.named_parameters())
    starts = ("encoder.stem.", "encoder.stages.0.", "semantic_layers.res2.")
    assert frozen == {name for name in names if name.startswith(starts)}
    assert [stage.training for stage in backbone.encoder.stages] == [False, True, True]
    assert not backbone.semantic_layers["res2"].training


def test_with_gamma_0_the_encoder_is_unchanged() -> None:
    """With the normalisation on the branch, but not with it in the residual stream."""
    image = torch.randn(1, 3, 37, 50)
    plain = build(semantic_attention=("none",) * 3).eval()(image)
    for norm in ("branch", "stream"):
        backbone = build(semantic_norm=norm).eval()
        for name, parameter in backbone.named_parameters():
            if name.endswith("gamma"):
                nn.init.zeros_(parameter)
        outputs = backbone(image)
        assert all(torch.equal(outputs[name], plain[name]) for name in plain) == (norm == "branch")


def test_swin_has_the_norm_in_the_residual_stream_as_published() -> None:
    image = torch.randn(1, 3, 32, 32)
    settings: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    backbone = SeMaskSwin(**settings, semantic_classes=CLASSES).eval()
    x = backbone.encoder.stem(image)
    for name, stage in zip(backbone.names, backbone.encoder.stages, strict=True):
        x = backbone.semantic_layers[name].norm(stage(x))  # all that a gamma of 0 leaves
    expected = backbone.output_norms["res5"](x).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(image)["res5"], expected)


@pytest.mark.parametrize("strides", [(2, 4, 8), (4, 8, 16, 16), (4, 16)])
@pytest.mark.parametrize("all_features", [True, False])
def test_priors_are_supervised_at_the_strides_of_the_encoder(
    strides: Sequence[int], all_features: bool
) -> None:
    stages = len(strides)
    names = [f"res{stage + 2}" for stage in range(stages)]
    backbone = build(
        encoder=ConvEncoder(strides),
        semantic_attention=("global",) * stages,
        semantic_blocks=(1,) * stages,
        out_features=names if all_features else [names[0], names[-1]],
        activation_checkpoint=(False,) * stages,
    )
    priors = {f"prior{stage + 2}": stride for stage, stride in enumerate(strides)}
    keys: dict[str, Any] = {
        "SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
        "SEM_SEG_HEAD.CONVS_DIM": 8,
        "SEM_SEG_HEAD.NORM": "BN",
        "SEM_SEG_HEAD.COMMON_STRIDE": strides[0],
        "SEM_SEG_HEAD.IN_FEATURES": list(backbone.output_shape()),
        "SEMASK.ATTENTION": ["global"] * stages,
        "SEMASK.NUM_BLOCKS": [1] * stages,
    }
    pairs = [f"MODEL.{key}={value}" for key, value in keys.items()]
    cfg = load_config("ade20k/semask_swin_tiny_fpn", pairs)
    head = SeMaskFPNHead(cfg, backbone.output_shape())
    model = SeMaskSegmentor(
        backbone=backbone, sem_seg_head=head, pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3
    )
    image, labels = torch.randn(3, 33, 50), torch.randint(CLASSES, (33, 50))
    torch.manual_seed(1)
    loss = model.train()([{"image": image, "sem_seg": labels}])["loss_prior"]
    torch.manual_seed(1)
    outputs = backbone(image[None])
    total: Any = 0
    for name, stride in priors.items():
        prior = outputs[name]
        while stride > strides[0]:
            prior, stride = F.interpolate(prior, scale_factor=2, mode="bilinear"), stride // 2
        size = outputs["res2"].shape[-2:]
        total = total + F.interpolate(prior, size=size, mode="bilinear")
    decoded = F.interpolate(total, size=labels.shape, mode="bilinear")
    torch.testing.assert_close(loss, 0.4 * F.cross_entropy(decoded, labels[None]))


class WithoutStrides(SeMaskBackbone):
    """A backbone with prior maps that does not tell their strides."""

    prior_strides = SemSegBackbone.prior_strides


def test_priors_of_a_backbone_that_does_not_tell_their_strides_are_supervised() -> None:
    """At those of the config, also in a stage between the features."""
    attention, blocks = ["global", "window", "none", "global"], [1, 1, 1, 1]
    arguments: dict[str, Any] = {
        "semantic_attention": attention,
        "semantic_blocks": blocks,
        "activation_checkpoint": (False,) * 4,
        "semantic_classes": CLASSES,
        "out_features": ("res2", "res5"),
    }
    keys: dict[str, Any] = {
        "SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
        "SEM_SEG_HEAD.CONVS_DIM": 8,
        "SEM_SEG_HEAD.NORM": "BN",
        "SEM_SEG_HEAD.IN_FEATURES": ["res2", "res5"],
        "SEMASK.ATTENTION": attention,
        "SEMASK.NUM_BLOCKS": blocks,
    }
    pairs = [f"MODEL.{key}={value}" for key, value in keys.items()]
    cfg = load_config("ade20k/semask_swin_tiny_fpn", pairs)
    inputs = [{"image": torch.randn(3, 33, 50), "sem_seg": torch.randint(CLASSES, (33, 50))}]
    losses = []
    for kind in (SeMaskBackbone, WithoutStrides):
        torch.manual_seed(0)
        backbone = kind(encoder=ConvEncoder((4, 8, 16, 32)), **arguments)
        model = SeMaskSegmentor(
            backbone=backbone,
            sem_seg_head=SeMaskFPNHead(cfg, backbone.output_shape()),
            pixel_mean=(0.0,) * 3,
            pixel_std=(1.0,) * 3,
        )
        losses.append(model.train()(inputs))
    assert losses[1]["loss_prior"] > 0
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("attention", ["none", "global"])
def test_the_head_on_a_backbone_of_detectron2(attention: str) -> None:
    """It trains without priors; settings that ask for priors are refused."""
    keys: dict[str, Any] = {
        "BACKBONE.NAME": "build_resnet_backbone",
        "RESNETS.DEPTH": 18,
        "RESNETS.RES2_OUT_CHANNELS": 64,
        "RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
        "SEM_SEG_HEAD.CONVS_DIM": 8,
        "SEM_SEG_HEAD.NORM": "BN",
        "SEMASK.ATTENTION": [attention] * 4,
        "DEVICE": "cpu",
    }
    pairs = [f"MODEL.{key}={value}" for key, value in keys.items()]
    cfg = load_config("ade20k/semask_swin_tiny_fpn", pairs)
    if attention != "none":
        with pytest.raises(ConfigError, match="prior maps"):
            build_model(cfg)
        return
    inputs = [{"image": torch.randn(3, 64, 64), "sem_seg": torch.randint(CLASSES, (64, 64))}]
    assert build_model(cfg).train()(inputs).keys() == {"loss_sem_seg"}


@pytest.mark.parametrize(
    "name",
    [name for name, build in BACKBONE_REGISTRY if build.__module__.startswith("semask.")],
)
def test_every_registered_backbone(name: str) -> None:
    """It returns what it says, for a detector and for a decoder, and all of it learns."""
    keys = {**SMALL_MODEL, "MODEL.BACKBONE.NAME": name, "MODEL.TIMM.NAME": "mit_b0"}
    backbone = build_backbone(load_config("coco/semask_swin_tiny_mask_rcnn_1x", flat(keys)))
    assert isinstance(backbone, SemSegBackbone)
    size = (96, 64) if backbone.size_divisibility else (90, 61)
    image = torch.randn(2, 3, *size)
    features, priors = backbone.output_shape(), backbone.prior_strides
    assert features
    assert priors

    def map_size(stride: int) -> tuple[int, ...]:
        return tuple(-(-side // stride) for side in size)

    outputs = backbone.train()(image)
    assert outputs.keys() == features.keys() | priors.keys()
    for feature, shape in features.items():
        assert outputs[feature].shape == (2, shape.channels, *map_size(shape.stride))
    for prior, stride in priors.items():
        assert outputs[prior].shape == (2, backbone.num_semantic_classes, *map_size(stride))
    torch.stack([output.square().sum() for output in outputs.values()]).sum().backward()
    assert [name for name, each in backbone.named_parameters() if each.grad is None] == []
    assert backbone.eval()(image).keys() == features.keys()
    assert backbone(image, return_priors=True).keys() == outputs.keys()


@pytest.mark.parametrize("norm", ["branch", "stream"])
@pytest.mark.parametrize(
    ("name", "plain_class"),
    [
        (name, plain)
        for name, path in FAST_PATHS.items()
        for plain in (SemanticLayer, SemanticAttention)
        if plain in path.forms
    ],
)
def test_fast_forms_suit_its_semantic_layers(
    name: str, plain_class: type[nn.Module], norm: str
) -> None:
    plain, fast = build(semantic_norm=norm), build(semantic_norm=norm)
    apply_fast_paths(fast, {name})
    form = FAST_PATHS[name].forms[plain_class]
    assert any(isinstance(module, form) for module in fast.modules())
    image = torch.randn(2, 3, 37, 50)
    with torch.inference_mode():
        torch.testing.assert_close(fast.eval()(image), plain.eval()(image))
    torch.testing.assert_close(gradients(fast, image), gradients(plain, image))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"semantic_attention": ("window", "none")}, "SEMASK.ATTENTION"),
        ({"semantic_attention": ("window", "none", "all")}, "SEMASK.ATTENTION"),
        ({"semantic_blocks": (1, 1, -1)}, "SEMASK.NUM_BLOCKS"),
        ({"semantic_classes": 0}, "NUM_CLASSES"),
        ({"semantic_window_size": 0}, "WINDOW_SIZE"),
        ({"out_features": ("res5",)}, "OUT_FEATURES"),
        ({"out_features": ("res2", "res3")}, "OUT_FEATURES"),  # the last stage would be idle
        ({"freeze_at": 5}, "FREEZE_AT"),
        ({"activation_checkpoint": (True,)}, "ACTIVATION_CHECKPOINT"),
    ],
)
def test_settings_that_cannot_be(overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build(**overrides)


def test_without_semantic_layers_it_is_the_encoder() -> None:
    backbone = build(semantic_attention=("none",) * 3, semantic_classes=0)
    assert backbone.prior_strides == {}
    assert not any(isinstance(module, SemanticLayer) for module in backbone.modules())
