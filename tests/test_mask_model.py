"""The models of mask classification as wholes: from a config to losses and predictions."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from torch import Tensor, nn

from reference_masks import (
    CASES,
    check_array,
    load_arrays,
    load_meta,
    reference_backbone,
    reference_head,
    reference_image,
)
from semask.errors import ConfigError, DataError
from semask.modeling import MultiScale, SeMaskMaskFormer
from semask.modeling.losses import Mask2FormerMatcher, MaskTarget
from semask.modeling.mask_decoder import MaskPrediction
from semask.ops.apply import apply_fast_paths
from semask.ops.lazy_scores import LazyScores
from tiny_masks import CLASSES, DECODERS, batch, build, config

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.mark.parametrize("case", CASES)
def test_whole_model_equals_reference(case: str) -> None:
    file = "model_101x137.npz"
    spec = load_meta(case)["files"][file]
    model = SeMaskMaskFormer(
        backbone=reference_backbone(case),
        sem_seg_head=reference_head(case),
        pixel_mean=MEAN,
        pixel_std=STD,
    )
    model = model.double().eval()
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
    model.pixel_mean, model.pixel_std = mean, std
    inputs = {
        "image": reference_image(case, file)[0].double() * std + mean,
        "height": spec["output_height"],
        "width": spec["output_width"],
    }
    expected = load_arrays(case, file)
    with torch.no_grad():
        scores = model([inputs])[0]["sem_seg"]
        check_array(case, file, "sem_seg", scores[None])
        np.testing.assert_array_equal(scores.argmax(dim=0), expected["argmax"])
        lazy = apply_fast_paths(model, ["streamed"]).predict(inputs)["sem_seg"]
    np.testing.assert_array_equal(lazy.labels(), expected["argmax"])


# ---- numbers of parameters, spec-masks B.7, with 150 classes ----

SIZES: dict[str, dict[str, Any]] = {
    "T": {"DEPTHS": [2, 2, 6, 2], "EMBED_DIM": 96, "NUM_HEADS": [3, 6, 12, 24], "WINDOW_SIZE": 7},
    "S": {"DEPTHS": [2, 2, 18, 2], "EMBED_DIM": 96, "NUM_HEADS": [3, 6, 12, 24], "WINDOW_SIZE": 7},
    "B": {
        "DEPTHS": [2, 2, 18, 2],
        "EMBED_DIM": 128,
        "NUM_HEADS": [4, 8, 16, 32],
        "WINDOW_SIZE": 12,
    },
    "L": {
        "DEPTHS": [2, 2, 18, 2],
        "EMBED_DIM": 192,
        "NUM_HEADS": [6, 12, 24, 48],
        "WINDOW_SIZE": 12,
    },
}
PARAMETERS = {
    ("plain", "mask2former"): (47_439_633, 68_757_537, 106_922_191, 215_488_779),
    ("semask", "mask2former"): (49_445_317, 70_763_221, 110_292_355, 222_632_383),
    ("plain", "maskformer"): (41_757_009, 63_074_913, 101_829_391, 211_575_627),
    ("semask", "maskformer"): (43_762_693, 65_080_597, 105_199_555, 218_719_231),
    ("semask", "mask2former_fapn"): (51_985_549, 73_303_453, 113_356_875, 226_745_479),
    ("semask", "mask2former_msfapn"): (50_664_349, 71_982_253, 111_511_387, 223_851_415),
}


BACKBONE_PARAMETERS = {
    "plain": (27_520_698, 48_838_602, 86_880_376, 195_201_204),
    "semask": (29_526_382, 50_844_286, 90_250_540, 202_344_808),
}
FOR_200_QUERIES = 51_200


@pytest.mark.parametrize("queries", [100, 200])
@pytest.mark.parametrize(("backbone", "decoder"), list(PARAMETERS))
def test_published_numbers_of_parameters(backbone: str, decoder: str, queries: int) -> None:
    counts, of_backbones = [], []
    for size in SIZES.values():
        cfg = config(
            decoder,
            DEVICE="meta",
            SEM_SEG_HEAD__NUM_CLASSES=150,
            SEM_SEG_HEAD__CONVS_DIM=256,
            SEM_SEG_HEAD__MASK_DIM=256,
            SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS=6,
            MASK_FORMER__NUM_OBJECT_QUERIES=queries,
            MASK_FORMER__DEC_LAYERS=6 if decoder == "maskformer" else 10,
            MASK_FORMER__HIDDEN_DIM=256,
            MASK_FORMER__DIM_FEEDFORWARD=2048,
            **{f"SWIN__{key}": value for key, value in size.items()},
        )
        if backbone == "plain":
            cfg.MODEL.SEMASK.ATTENTION = ["none"] * 4
        with torch.device("meta"):
            model = build_model(cfg)
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
        of_backbones.append(sum(parameter.numel() for parameter in model.backbone.parameters()))
    more = 0 if queries == 100 else FOR_200_QUERIES // (2 if decoder == "maskformer" else 1)
    assert tuple(counts) == tuple(count + more for count in PARAMETERS[backbone, decoder])
    assert tuple(of_backbones) == BACKBONE_PARAMETERS[backbone]


# ---- training ----


@pytest.mark.parametrize("decoder", DECODERS)
def test_training_gives_the_losses_of_every_layer_and_gradients_everywhere(decoder: str) -> None:
    model = build(decoder).train()
    losses = model(batch((40, 70), (64, 50)))
    layers = 3  # predictions
    names = {f"loss_{kind}" for kind in ("ce", "mask", "dice")}
    names |= {f"{name}_{i}" for name in names for i in range(layers - 1)}
    assert set(losses) == names | {"loss_prior"}
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("decoder", ["maskformer", "mask2former"])
def test_padding_is_no_class_and_no_mask(decoder: str) -> None:
    """A batch that is padded by the model, and one padded before."""
    model = build(decoder, PIXEL_MEAN=[0.0] * 3, PIXEL_STD=[1.0] * 3).train()
    small, large = batch((40, 70)), batch((40, 70))
    sample = large[0]
    sample["image"] = tiny_pad(sample["image"], 0)
    sample["sem_seg"] = tiny_pad(sample["sem_seg"], 255)
    masks = tiny_pad(sample["instances"].gt_masks, 0)
    sample["instances"]._image_size = (64, 96)
    sample["instances"].gt_masks = BitMasks(masks)  # the form of Detectron2's mappers
    results = []
    for samples in (small, large):
        torch.manual_seed(0)
        results.append(model(samples))
    for name, loss in results[0].items():
        torch.testing.assert_close(loss, results[1][name], msg=name)


def tiny_pad(x: Tensor, value: int) -> Tensor:
    height, width = x.shape[-2:]
    return nn.functional.pad(x, (0, 96 - width, 0, 64 - height), value=value)


@pytest.mark.parametrize("decoder", ["maskformer", "mask2former"])
def test_images_without_targets_teach_no_object_alone(decoder: str) -> None:
    model = build(decoder).train()
    losses = model(batch((64, 64), (64, 64), empty=(0, 1)))
    for name, loss in losses.items():
        assert loss.requires_grad, name
        assert (loss > 0) == name.startswith("loss_ce"), name
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_images_without_instances_need_no_masks() -> None:
    model = build().train()
    (sample,) = batch((64, 64), empty=(0,))
    (bare,) = batch((64, 64), empty=(0,))
    # As Detectron2's annotations_to_instances gives an image whose list of annotations is empty.
    bare["instances"].remove("gt_masks")
    torch.manual_seed(0)
    expected = model([sample])
    torch.manual_seed(0)
    losses = model([bare])
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decoder", DECODERS)
def test_half_precision_gives_losses_in_float32(decoder: str, dtype: torch.dtype) -> None:
    model = build(decoder).train()
    with torch.autocast("cpu", dtype=dtype):
        losses = model(batch((64, 64)))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("paths", [[], ["streamed"]], ids=["plain", "streamed"])
def test_half_precision_ends_at_the_queries(paths: list[str]) -> None:
    model = apply_fast_paths(build("maskformer"), paths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(batch((40, 70)))[0]["sem_seg"]
    assert scores.dtype == torch.float32
    assert len(scores.unique()) > 0.9 * scores[0].numel()  # not rounded to bfloat16


def test_deep_supervision_can_be_left_out() -> None:
    losses = build(MASK_FORMER__DEEP_SUPERVISION=False).train()(batch((64, 64)))
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice", "loss_prior"}


@pytest.mark.parametrize("decoder", ["maskformer", "mask2former"])
@pytest.mark.parametrize("part", ["class_embed", "mask_embed"])
def test_logits_that_are_not_finite_make_a_loss_that_is_not(
    decoder: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(decoder).train()
    for parameter in model.sem_seg_head.predictor.get_submodule(part).parameters():
        nn.init.constant_(parameter, float("nan"))
    losses = model(batch((64, 64), (64, 64)))
    assert losses["loss_ce"].isnan()
    assert "NaN or infinite logits, in image 0, 1 of the batch" in caplog.text


def test_more_targets_than_queries_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    matcher = Mask2FormerMatcher(num_points=16)
    prediction = MaskPrediction(torch.randn(1, 2, CLASSES + 1), torch.randn(1, 2, 8, 8))
    target = MaskTarget(torch.tensor([0, 1, 2]), torch.rand(3, 32, 32) > 0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            (match,) = matcher(prediction, [target])
    assert len(match.queries) == len(match.targets) == 2
    assert caplog.text.count("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES") == 1


def semantic_gradients(init: str) -> tuple[list[float], list[float], list[float]]:
    """The largest gradient of gamma and of proj, and how far they have moved, after each step;
    and, from the second step on, the largest gradient of each weight of key and value. Query
    makes the prior maps, and learns from their loss in any case."""
    model = build(SEMASK__INIT=init, SEMASK__DROPOUT=0.0).train()
    attentions = [layer.blocks[0] for layer in model.backbone.semantic_layers.values()]
    assert len(attentions) == 4
    for attention in attentions:  # tiny_masks.build has changed it
        nn.init.zeros_(attention.gamma)
    watched = [p for each in attentions for p in (each.gamma, *each.proj.parameters())]
    before = [p.detach().clone() for p in watched]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    gradients, moves, inner = [], [], []
    for step in range(4):
        optimizer.zero_grad()
        torch.stack(list(model(batch((64, 64))).values())).sum().backward()
        gradients.append(min(each.gamma.grad.abs().item() for each in attentions))
        gradients.append(max(p.grad.abs().max().item() for p in watched))
        if step:
            inner += [
                linear.weight.grad.abs().max().item()
                for each in attentions
                for linear in (each.key, each.value)
            ]
        optimizer.step()
        moves.append(min((each.gamma.abs().item()) for each in attentions))
        moves.append(max((p - q).abs().max().item() for p, q in zip(watched, before, strict=True)))
    return gradients, moves, inner


def test_live_attention_learns() -> None:
    gradients, moves, inner = semantic_gradients("live")
    assert min(gradients) > 0
    assert min(moves) > 0
    assert min(inner) > 0


def test_published_attention_never_acts() -> None:
    gradients, moves, inner = semantic_gradients("published")
    assert max(gradients) == 0
    assert max(moves) == 0
    assert max(inner) == 0


# ---- prediction ----


class Panoptic:
    """The last two classes are stuff."""

    name = "tiny_panoptic_masks"
    keys: Mapping[str, Any] = {
        "MASK_FORMER__TEST__INSTANCE_ON": True,
        "MASK_FORMER__TEST__PANOPTIC_ON": True,
        "MASK_FORMER__TEST__OBJECT_MASK_THRESHOLD": 0.2,
        "MASK_FORMER__TEST__OVERLAP_THRESHOLD": 0.1,
    }


@pytest.fixture
def panoptic_model(catalogs: None) -> Any:
    things = {i: i for i in range(CLASSES - 2)}
    MetadataCatalog.get(Panoptic.name).set(thing_dataset_id_to_contiguous_id=things)
    cfg = config(**Panoptic.keys)
    cfg.DATASETS.TRAIN = (Panoptic.name,)
    torch.manual_seed(1)
    model = build_model(cfg).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("class_embed.weight", "mask_embed.layers.2.weight")):
            nn.init.normal_(parameter)
    return model


@torch.no_grad()
def test_all_tasks_at_once_and_their_streamed_form(panoptic_model: Any) -> None:
    inputs = batch((40, 70), (64, 50))
    plain = panoptic_model(inputs)
    streamed = apply_fast_paths(panoptic_model, ["streamed"])
    assert type(streamed) is not SeMaskMaskFormer
    for sample, want, got in zip(inputs, plain, streamed(inputs), strict=True):
        size = (sample["height"], sample["width"])
        assert set(want) == set(got) == {"sem_seg", "instances", "panoptic_seg"}
        assert want["sem_seg"].shape == (CLASSES, *size)
        torch.testing.assert_close(got["sem_seg"], want["sem_seg"])
        ids, segments = want["panoptic_seg"]
        assert ids.shape == size
        assert segments
        assert got["panoptic_seg"][1] == segments
        assert torch.equal(got["panoptic_seg"][0], ids)
        instances, others = want["instances"], got["instances"]
        assert 0 < len(instances) <= 6 * CLASSES
        assert instances.pred_classes.max() < CLASSES - 2  # things alone
        assert torch.equal(instances.pred_classes, others.pred_classes)
        assert torch.equal(instances.pred_masks, others.pred_masks)
        assert torch.equal(instances.pred_boxes.tensor, others.pred_boxes.tensor)
        torch.testing.assert_close(instances.scores, others.scores)


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_streamed_semantic_scores_equal_plain(decoder: str) -> None:
    model = build(decoder)
    inputs = batch((40, 70))
    want = model.inference(inputs, return_priors=True)[0]
    got = apply_fast_paths(model, ["streamed"]).predict(inputs[0], return_priors=True)
    assert isinstance(got["sem_seg"], LazyScores)
    assert got["sem_seg"].kind == "scores"
    torch.testing.assert_close(got["sem_seg"].full(), want["sem_seg"])
    assert torch.equal(got["sem_seg"].labels(), want["sem_seg"].argmax(dim=0))
    assert got["prior"].shape == want["prior"].shape == want["sem_seg"].shape
    assert set(got["priors"]) == {"prior2", "prior3", "prior4", "prior5"}


@torch.no_grad()
def test_queries_are_asked_without_the_padding() -> None:
    model = build()
    (sample,) = batch((38, 70))  # padded to 64 x 96
    outputs: list[dict[str, torch.Tensor]] = []
    model.sem_seg_head.register_forward_hook(lambda *each: outputs.append(each[-1]))
    found = model.predict_queries(sample, 3)
    assert found.masks.shape == (3, 10, 18)
    masks = outputs[0]["pred_masks"]
    assert masks.shape[-2:] == (16, 24)
    assert torch.equal(found.masks, masks[0, found.queries, :10, :18].sigmoid())


@torch.no_grad()
def test_multi_scale_scores_are_the_mean_of_the_views() -> None:
    model = build()
    sample = batch((40, 70))[0]
    other = batch((50, 90))[0]["image"]
    size = {"height": sample["height"], "width": sample["width"]}
    views = []
    for image in (sample["image"], other):
        for mirrored in (False, True):
            view = {"image": image.flip(-1) if mirrored else image, **size}
            scores = model([view])[0]["sem_seg"]
            views.append(scores.flip(-1) if mirrored else scores)
    model.protocol = MultiScale(flip=True)
    got = model([{**sample, "images": [sample["image"], other]}])[0]["sem_seg"]
    torch.testing.assert_close(got, torch.stack(views).mean(dim=0))


@torch.no_grad()
def test_a_head_can_be_replaced_by_anything_that_gives_queries() -> None:
    class Constant(nn.Module):
        def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
            height, width = features["res2"].shape[-2:]
            masks = torch.full((1, 1, height, width), 9.0)
            return {"pred_logits": torch.tensor([[[0.0, 9.0, 0.0]]]), "pred_masks": masks}

    model = SeMaskMaskFormer(
        backbone=build().backbone, sem_seg_head=Constant(), pixel_mean=MEAN, pixel_std=STD
    ).eval()
    scores = model(batch((40, 70)))[0]["sem_seg"]
    assert scores.shape == (2, 49, 67)
    assert (scores.argmax(dim=0) == 1).all()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("MASK_FORMER__NUM_OBJECT_QUERIES", 0, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"),
        ("MASK_FORMER__DECODER", "segformer", "MODEL.MASK_FORMER.DECODER"),
        ("MASK_FORMER__DEC_LAYERS", 0, "MODEL.MASK_FORMER.DEC_LAYERS"),
        ("MASK_FORMER__NHEADS", 5, "MODEL.MASK_FORMER.NHEADS"),
        ("MASK_FORMER__TRAIN_NUM_POINTS", 0, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS"),
        ("MASK_FORMER__OVERSAMPLE_RATIO", 0.5, "MODEL.MASK_FORMER.OVERSAMPLE_RATIO"),
        ("MASK_FORMER__IMPORTANCE_SAMPLE_RATIO", 2.0, "IMPORTANCE_SAMPLE_RATIO"),
        ("MASK_FORMER__SIZE_DIVISIBILITY", 0, "MODEL.MASK_FORMER.SIZE_DIVISIBILITY"),
        ("MASK_FORMER__TEST__SEMANTIC_ON", False, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON"),
        ("MASK_FORMER__TEST__PANOPTIC_ON", True, "thing_dataset_id_to_contiguous_id"),
        ("SEM_SEG_HEAD__IN_FEATURES", ["res2", "res6"], "MODEL.SEM_SEG_HEAD.IN_FEATURES"),
        ("SEM_SEG_HEAD__IN_FEATURES", ["res2", "res3"], "MODEL.SEM_SEG_HEAD.IN_FEATURES"),
        ("SEM_SEG_HEAD__NUM_CLASSES", 0, "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
        ("SEMASK__INIT", "dead", "MODEL.SEMASK.INIT"),
    ],
)
def test_config_that_cannot_be_is_refused(key: str, value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_model(config(**{key: value}))


def test_protocols_that_average_scores_are_for_semantic_alone() -> None:
    cfg = config(MASK_FORMER__TEST__INSTANCE_ON=True)
    cfg.TEST.PROTOCOL = "multi_scale"
    with pytest.raises(ConfigError, match=r"TEST\.PROTOCOL"):
        build_model(cfg)


def test_annotations_that_do_not_fit_are_refused() -> None:
    model = build().train()
    (sample,) = batch((32, 40))
    with pytest.raises(DataError, match=r"0\.png.*'sem_seg'"):
        model([{k: v for k, v in sample.items() if k not in ("instances", "sem_seg")}])
    with pytest.raises(DataError, match=r"0\.png.*label map"):
        model([{**sample, "sem_seg": sample["sem_seg"][1:]}])
    instances = sample["instances"]
    instances.gt_classes = instances.gt_classes + CLASSES
    with pytest.raises(DataError, match=r"0\.png.*MODEL\.SEM_SEG_HEAD\.NUM_CLASSES"):
        model([sample])
    (sample,) = batch((32, 40))
    with pytest.raises(DataError, match=r"0\.png.*masks"):
        model([{**sample, "image": sample["image"][:, 1:]}])
    sample["instances"].remove("gt_masks")
    with pytest.raises(DataError, match=r"0\.png.*without masks"):
        model([sample])
