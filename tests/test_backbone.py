"""The backbone's interface, alone and with Detectron2's own modules."""

from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, SemanticSegmentor, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import nn

from semask.config.loading import load_config
from semask.errors import ConfigError
from semask.modeling import (
    PriorSupervision,
    SegmentationLoss,
    SemanticFPNDecoder,
    SemanticLayer,
    SemanticPriorDecoder,
    SeMaskFPNHead,
    SeMaskSegmentor,
    SeMaskSwin,
    semantic_scores,
)
from semask.modeling.backbone.windows import WindowAttention

CLASSES = 5
PIXELS: dict[str, Any] = {"pixel_mean": [120.0, 110.0, 100.0], "pixel_std": [60.0, 61.0, 62.0]}


def tiny(**overrides: Any) -> SeMaskSwin:
    settings: dict[str, Any] = {
        "embed_dim": 8,
        "depths": (2, 1, 1, 1),
        "num_heads": (1, 2, 2, 2),
        "window_size": 4,
        "semantic_classes": CLASSES,
        "drop_path_rate": 0.0,
        "semantic_dropout": 0.0,
    }
    torch.manual_seed(0)
    backbone = SeMaskSwin(**{**settings, **overrides})
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.7)  # at 0 the attention would be invisible
    return backbone


def head_for(backbone: SeMaskSwin, **overrides: Any) -> SeMaskFPNHead:
    fpn = SemanticFPNDecoder(
        input_shape=backbone.output_shape(),
        num_classes=CLASSES,
        conv_dims=8,
        norm="BN",
        dropout=0.0,
    )
    prior = PriorSupervision(
        strides={f"prior{i}": 2**i for i in range(2, 6)}, num_classes=CLASSES, weight=0.4
    )
    settings: dict[str, Any] = {
        "semantic_fpn": fpn,
        "prior_supervision": prior,
        "num_classes": CLASSES,
    }
    return SeMaskFPNHead(**{**settings, **overrides})


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (4, 4), (1, 1), (1, 70)])
def test_features_and_priors_have_the_promised_shapes(size: tuple[int, int]) -> None:
    backbone = tiny().eval()
    outputs = backbone(torch.randn(2, 3, *size), return_priors=True)
    assert set(outputs) == {f"{kind}{i}" for kind in ("res", "prior") for i in range(2, 6)}
    for name, shape in backbone.output_shape().items():
        assert shape.channels is not None
        assert shape.stride is not None
        expected = tuple(-(-side // shape.stride) for side in size)
        assert outputs[name].shape == (2, shape.channels, *expected)
        assert outputs[name.replace("res", "prior")].shape == (2, CLASSES, *expected)
        assert outputs[name].isfinite().all()


def test_priors_travel_in_training_or_when_asked_for() -> None:
    backbone = tiny()
    image = torch.randn(1, 3, 32, 32)
    assert "prior2" in backbone.train()(image)
    assert "prior2" not in backbone(image, return_priors=False)
    assert "prior2" not in backbone.eval()(image)
    assert "prior2" in backbone(image, return_priors=True)


def test_output_shape_lists_features_only_and_follows_out_features() -> None:
    backbone = tiny(out_features=("res4", "res2"))
    assert list(backbone.output_shape()) == ["res2", "res4"]
    assert backbone.output_shape()["res4"] == ShapeSpec(channels=32, stride=16)
    assert len(backbone.encoder.stages) == 3  # nothing is built that is not used
    assert set(backbone.eval()(torch.randn(1, 3, 32, 32))) == {"res2", "res4"}


def test_without_semantic_layers_it_is_plain_swin() -> None:
    for overrides in (
        {"semantic_attention": ("none",) * 4, "semantic_classes": 0},
        {"semantic_blocks": (0,) * 4, "semantic_classes": 0},
    ):
        backbone = tiny(**overrides).train()
        assert not any("semantic" in name for name, _ in backbone.named_parameters())
        assert backbone.num_semantic_classes == 0
        assert set(backbone(torch.randn(1, 3, 32, 32))) == {"res2", "res3", "res4", "res5"}


def test_stock_fpn_works_on_it_in_training_and_evaluation() -> None:
    fpn = FPN(tiny(), ["res2", "res3", "res4", "res5"], 16, top_block=LastLevelMaxPool())
    for mode in (True, False):
        outputs = fpn.train(mode)(torch.randn(1, 3, 64, 64))
        assert set(outputs) == {"p2", "p3", "p4", "p5", "p6"}
        assert outputs["p3"].shape == (1, 16, 8, 8)


def batch(height: int = 64, width: int = 96) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "image": torch.randint(0, 256, (3, height, width), generator=generator).to(torch.uint8),
            "sem_seg": torch.randint(0, CLASSES, (height, width), generator=generator),
            "height": height + 10,
            "width": width + 30,
        }
        for _ in range(2)
    ]


def test_stock_segmentor_trains_and_predicts_with_our_head() -> None:
    backbone = tiny()
    model = SemanticSegmentor(backbone=backbone, sem_seg_head=head_for(backbone), **PIXELS)
    losses = model.train()(batch())
    assert set(losses) == {"loss_sem_seg", "loss_prior"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        outputs = model.eval()(batch())
    assert outputs[0]["sem_seg"].shape == (CLASSES, 74, 126)


def test_stock_segmentor_with_stock_fpn_and_stock_head() -> None:
    fpn = FPN(tiny(), ["res2", "res3", "res4", "res5"], 16)
    head = SemSegFPNHead(
        {name: shape for name, shape in fpn.output_shape().items() if name != "p6"},
        num_classes=CLASSES,
        conv_dims=8,
        common_stride=4,
        norm="BN",
    )
    model = SemanticSegmentor(backbone=fpn, sem_seg_head=head, **PIXELS)
    assert set(model.train()(batch())) == {"loss_sem_seg"}
    with torch.no_grad():
        assert model.eval()(batch())[0]["sem_seg"].shape == (CLASSES, 74, 126)


def test_published_protocol_equals_detectron2_for_multiples_of_4() -> None:
    backbone = tiny()
    parts: dict[str, Any] = {"backbone": backbone, "sem_seg_head": head_for(backbone), **PIXELS}
    ours, stock = SeMaskSegmentor(**parts).eval(), SemanticSegmentor(**parts).eval()
    with torch.no_grad():
        same = [m([{**batch()[0]}])[0]["sem_seg"] for m in (ours, stock)]
        other = [m([{**batch(61, 95)[0]}])[0]["sem_seg"] for m in (ours, stock)]
    torch.testing.assert_close(*same)
    assert (other[0] - other[1]).abs().max() > 1e-4


def test_segmentor_gives_priors_on_request_and_computes_none_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = tiny()
    head = head_for(backbone)
    model = SeMaskSegmentor(backbone=backbone, sem_seg_head=head, **PIXELS).eval()
    inputs = batch(61, 95)
    with torch.no_grad():
        output = model.inference(inputs, return_priors=True)[1]
        assert output["prior"].shape == output["sem_seg"].shape == (CLASSES, 71, 125)
        assert output["priors"]["prior5"].shape == (CLASSES, 2, 3)

        def fail(*_args: Any) -> None:
            raise AssertionError("the prior head ran in evaluation")

        monkeypatch.setattr(SemanticPriorDecoder, "forward", fail)
        plain = model(inputs)[1]
    assert set(plain) == {"sem_seg"}
    torch.testing.assert_close(plain["sem_seg"], output["sem_seg"])


def test_the_head_predicts_logits_at_stride_4() -> None:
    backbone = tiny().eval()
    features = backbone(torch.randn(1, 3, 61, 95))
    prediction = head_for(backbone).eval().predict(features)
    assert prediction["logits"].shape == (1, CLASSES, 16, 24)
    assert semantic_scores(prediction, (61, 95)).shape == (1, CLASSES, 61, 95)


def test_head_says_which_prior_is_missing() -> None:
    backbone = tiny(semantic_attention=("window", "none", "global", "global")).train()
    with pytest.raises(ValueError, match="returned no prior3"):
        head_for(backbone)(backbone(torch.randn(1, 3, 64, 64)), torch.zeros(1, 64, 64).long())


def test_head_needs_labels_in_training_and_a_feature_of_its_stride() -> None:
    backbone = tiny().train()
    with pytest.raises(ValueError, match="labels in training"):
        head_for(backbone)(backbone(torch.randn(1, 3, 32, 32)))
    with pytest.raises(ValueError, match="stride"):
        SemanticFPNDecoder(input_shape={"res3": ShapeSpec(channels=8, stride=8)}, num_classes=2)


@pytest.mark.parametrize("size", [(8, 8), (12, 4)])
def test_shift_keeps_apart_what_only_the_roll_joined(size: tuple[int, int]) -> None:
    height, width, window, shift = *size, 4, 2
    masks = WindowAttention(dim=4, num_heads=2, window_size=window, shift=shift).mask(*size)
    # Position of each rolled token before the roll: tokens of a window are neighbours exactly
    # where neither of the two wrapped around alone.
    wrapped = torch.zeros(height, width, 2, dtype=torch.bool)
    wrapped[height - shift :, :, 0] = True
    wrapped[:, width - shift :, 1] = True
    assert len(masks) == height * width // window**2
    for index, mask in enumerate(masks):
        row, col = divmod(index, width // window)
        patch = wrapped[row * window : (row + 1) * window, col * window : (col + 1) * window]
        tokens = patch.reshape(-1, 2)
        together = (tokens[:, None] == tokens[None, :]).all(-1)
        assert torch.equal(mask == 0, together)
        assert (mask[~together] == -100).all()


def test_evaluation_in_inference_mode_leaves_nothing_that_training_trips_over() -> None:
    backbone = tiny(window_size=3)
    image = torch.randn(1, 3, 40, 40)
    with torch.inference_mode():
        backbone.eval()(image)
    sum(v.sum() for v in backbone.train()(image).values()).backward()
    assert backbone.encoder.stem.patch_embed.proj.weight.grad is not None


def test_semantic_window_as_large_as_the_map_is_global() -> None:
    torch.manual_seed(0)
    window = SemanticLayer(dim=8, num_classes=3, window_size=6, num_blocks=2).eval()
    with torch.no_grad():
        for block in window.blocks:
            block.gamma.fill_(0.5)
    everywhere = SemanticLayer(dim=8, num_classes=3, window_size=None, num_blocks=2).eval()
    everywhere.load_state_dict(window.state_dict())
    x = torch.randn(2, 6, 6, 8)
    for mine, other in zip(window(x), everywhere(x), strict=True):
        torch.testing.assert_close(mine, other)


def test_semantic_layer_follows_the_paper() -> None:
    """One group, token by token, as the formula reads."""
    torch.manual_seed(0)
    layer = SemanticLayer(dim=8, num_classes=3, window_size=None).double().eval()
    block: Any = layer.blocks[0]
    torch.nn.init.constant_(block.gamma, 0.5)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    tokens = layer.norm(x).reshape(6, 8)
    query, key, value = block.query(tokens), block.key(tokens), block.value(tokens)
    expected = []
    for i in range(6):
        scores = torch.stack([query[i] @ key[j] for j in range(6)]).exp()
        mixed = sum(scores[j] / scores.sum() * value[j] for j in range(6))
        expected.append(0.5 * block.proj(mixed) + tokens[i])
    features, prior = layer(x)
    torch.testing.assert_close(features.reshape(6, 8), torch.stack(expected))
    torch.testing.assert_close(prior.reshape(6, 3), query)


def test_chained_blocks_return_the_last_query() -> None:
    torch.manual_seed(0)
    layer = SemanticLayer(dim=8, num_classes=3, window_size=None, num_blocks=2).eval()
    x = torch.randn(1, 2, 2, 8)
    tokens = layer.norm(x).flatten(1, 2)
    tokens, _ = layer.blocks[0](tokens)
    _, expected = layer.blocks[1](tokens)
    torch.testing.assert_close(layer(x)[1].flatten(1, 2), expected)


def test_new_model_starts_as_the_plain_backbone_but_its_attention_learns() -> None:
    torch.manual_seed(0)
    layer = SemanticLayer(dim=8, num_classes=3, window_size=None)
    x = torch.randn(1, 4, 4, 8)
    features, _ = layer.train()(x)
    torch.testing.assert_close(features, layer.norm(x))
    backbone = SeMaskSwin(embed_dim=8, num_heads=(1, 1, 2, 2), semantic_classes=CLASSES)
    backbone.eval()(torch.randn(1, 3, 32, 32))["res5"].square().sum().backward()
    gammas = [p for name, p in backbone.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 4
    assert all(gamma.item() == 0 and gamma.grad.abs() > 0 for gamma in gammas)


def test_drop_path_rises_linearly_and_spares_the_semantic_layers() -> None:
    backbone = tiny(depths=(2, 1, 1, 1), drop_path_rate=0.4)
    rates = [block.drop_path.rate for stage in backbone.encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_activation_checkpointing_changes_no_gradient() -> None:
    image = torch.randn(1, 3, 40, 40)
    gradients = []
    for kept in (False, True):
        backbone = tiny(
            drop_path_rate=0.3, semantic_dropout=0.1, activation_checkpoint=(kept,) * 4
        ).train()
        torch.manual_seed(5)
        sum(v.square().sum() for v in backbone(image).values()).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_frozen_stages_do_not_learn_and_stay_in_evaluation_mode(freeze_at: int) -> None:
    backbone = tiny(freeze_at=freeze_at, absolute_pos_embed=True, pretrain_image_size=32).train()
    stem = backbone.encoder.stem
    assert all(p.requires_grad == (freeze_at < 1) for p in stem.parameters())
    assert stem.absolute_pos_embed is not None
    for index, stage in enumerate(backbone.encoder.stages):
        frozen = index < freeze_at - 1
        for part in (stage.blocks, backbone.semantic_layers[f"res{index + 2}"]):
            assert all(module.training != frozen for module in part.modules() if module is not part)
            assert all(p.requires_grad != frozen for p in part.parameters())
        if index:  # frozen with the stage in front of it, as Detectron2 has it
            assert all(
                p.requires_grad != (index < freeze_at) for p in stage.downsample.parameters()
            )
    assert backbone.output_norms["res2"].weight.requires_grad


def test_absolute_position_embedding_fits_any_size() -> None:
    backbone = tiny(absolute_pos_embed=True, pretrain_image_size=32).eval()
    image = torch.randn(1, 3, 36, 52)
    before = backbone(image)["res2"]
    torch.nn.init.normal_(backbone.encoder.stem.absolute_pos_embed)
    assert not torch.allclose(before, backbone(image)["res2"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (2, 2, 2)}, r"MODEL.SWIN.DEPTHS has 3, MODEL.SWIN.NUM_HEADS has 4"),
        ({"num_heads": (1, 2, 4)}, "MODEL.SWIN.NUM_HEADS has 3"),
        ({"semantic_blocks": (1,)}, "MODEL.SEMASK.NUM_BLOCKS has 1"),
        ({"depths": (2, -1, 1, 1)}, "DEPTHS needs whole numbers of at least 1"),
        ({"num_heads": ("a", 2, 2, 2)}, "NUM_HEADS needs whole numbers"),
        ({"semantic_blocks": (1, -1, 1, 1)}, "NUM_BLOCKS needs whole numbers of at least 0"),
        ({"embed_dim": 0}, "EMBED_DIM needs whole numbers of at least 1"),
        ({"drop_path_rate": 1.0}, "DROP_PATH_RATE must be in"),
        ({"num_heads": (3, 2, 2, 2)}, r"NUM_HEADS\[0\] = 3 must divide"),
        ({"window_size": 0}, "MODEL.SWIN.WINDOW_SIZE"),
        (
            {"semantic_attention": ("window", "local", "global", "none")},
            r"ATTENTION\[1\] = 'local'",
        ),
        ({"out_features": ("res6",)}, "OUT_FEATURES"),
        ({"freeze_at": 9}, "FREEZE_AT must be 0 to 5"),
        ({"semantic_classes": 0}, "need a number of classes"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_backbone_and_head_with_other_classes_do_not_go_together() -> None:
    backbone = tiny(semantic_classes=CLASSES + 1)
    with pytest.raises(ConfigError, match=r"have 5 classes.*have 6"):
        SeMaskSegmentor(backbone=backbone, sem_seg_head=head_for(backbone), **PIXELS)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [({"reduction": "mean"}, "LOSS_REDUCTION"), ({"ohem_pixels": -1}, "OHEM_PIXELS")],
)
def test_losses_that_cannot_be_are_refused(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        SegmentationLoss(**arguments)


def test_fewer_features_than_stages_train_from_a_config() -> None:
    cfg = load_config()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SeMaskSegmentor"
    cfg.MODEL.BACKBONE.NAME = "SeMaskSwin"
    cfg.MODEL.SWIN.EMBED_DIM = 12
    cfg.MODEL.SWIN.OUT_FEATURES = ["res2", "res3", "res4"]
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SeMaskFPNHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = CLASSES
    cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
    model = build_model(cfg)
    assert set(model.sem_seg_head.prior_supervision.decoder.strides) == {
        "prior2",
        "prior3",
        "prior4",
    }
    losses = model.train()(batch())
    assert all(loss.isfinite() for loss in losses.values())


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    backbone = SeMaskSwin(
        embed_dim=48, depths=(2, 2, 2, 2), semantic_classes=50, absolute_pos_embed=True
    )
    small = [p for name, p in backbone.named_parameters() if name.endswith("_bias_table")]
    small += [m.weight for m in backbone.modules() if isinstance(m, nn.Linear)]
    for weight in small:
        assert weight.std().item() == pytest.approx(0.02, rel=0.12)
        assert weight.abs().max() <= 2.0  # torch truncates at plus and minus 2
    for module in backbone.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    head = SemanticFPNDecoder(input_shape=backbone.output_shape(), num_classes=50, norm="BN")
    assert head.predictor.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.predictor.bias.any()
    scale_heads: Any = head.scale_heads
    for name, scale_head in scale_heads.items():
        for conv in scale_head:
            if isinstance(conv, nn.Conv2d):
                expected = (2 / (conv.out_channels * 9)) ** 0.5  # Kaiming, fan_out, ReLU
                assert conv.weight.std().item() == pytest.approx(expected, rel=0.05), name
