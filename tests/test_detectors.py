"""Detectron2's detectors on SeMask Swin, and the one loss that the prior adds."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    FPN,
    GeneralizedRCNN,
    PanopticFPN,
    RetinaNet,
    build_model,
)
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from semask.checkpoint import SeMaskCheckpointer
from semask.config.loading import load_config
from semask.engine.compilation import compile_for_training
from semask.errors import ConfigError
from semask.modeling import PriorFPN, PriorSupervisedDetector
from semask.modeling.backbone.contract import SemSegBackbone
from semask.modeling.heads import SemanticPriorDecoder
from semask.modeling.meta_arch.detectors import outputs_of
from semask.ops.apply import apply_fast_paths, select_fast_paths
from semask.ops.striped_loss import StripedSegmentationLoss
from semask.utils.precision import Precision
from tiny_instances import SMALL_MODEL, flat

CONFIGS = Path(__file__).parents[1] / "configs"
DETECTORS = sorted(
    path.relative_to(CONFIGS).as_posix()
    for folder in ("coco", "nuclei")
    for path in (CONFIGS / folder).glob("*.yaml")
    if "mask2former" not in path.stem
)
# Mask classification of instances and of segments.
MASK_MODELS = sorted(
    path.relative_to(CONFIGS).as_posix()
    for folder in ("ade20k", "cityscapes", "coco", "nuclei", "scenes")
    for path in (CONFIGS / folder).glob("*mask2former*.yaml")
    if folder in ("coco", "nuclei") or "_instance" in path.stem or "_panoptic" in path.stem
)
SMALL_MASKS = {
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 2,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 48,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 6,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
}
ARCHITECTURES = {
    "mask_rcnn": GeneralizedRCNN,
    "cascade_mask_rcnn": GeneralizedRCNN,
    "retinanet": RetinaNet,
    "panoptic_fpn": PanopticFPN,
}
MASK_RCNN = "coco/semask_swin_tiny_mask_rcnn_1x.yaml"

pytestmark = pytest.mark.usefixtures("one_thread")


def config(name: str = MASK_RCNN, **overrides: Any) -> CfgNode:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(str(CONFIGS / name), flat({**SMALL_MODEL, **keys}))


def sample(cfg: CfgNode, height: int = 64, width: int = 80, *, number: int = 2) -> dict[str, Any]:
    """An image with bright instances, and every target that a detector may want."""
    image = torch.rand(3, height, width) * 100
    instances = Instances((height, width))
    corners = torch.tensor([[4, 6, 24, 30], [36, 30, 52, 50]][:number]).reshape(number, 4)
    masks = torch.zeros(number, height, width, dtype=torch.bool)
    target = torch.full((height, width), 2)
    for index, (x0, y0, x1, y1) in enumerate(corners.tolist()):
        masks[index, y0:y1, x0:x1] = True
        target[masks[index]] = index
    image += 150 * masks.any(0)
    instances.gt_boxes = Boxes(corners.float())
    instances.gt_classes = torch.arange(number)
    if number:
        instances.gt_masks = BitMasks(masks)
    return {
        "image": image,
        "instances": instances,
        "prior_target": target,
        "sem_seg": target,
        "height": height // 2,
        "width": width // 2,
    }


def losses_of(model: nn.Module, batch: list[dict[str, Any]], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    with EventStorage():
        return model.train()(batch)


@pytest.mark.parametrize("name", DETECTORS)
def test_each_config_takes_a_step_and_predicts(name: str) -> None:
    cfg = config(name)
    torch.manual_seed(0)
    model = build_model(cfg)
    file = Path(name).stem
    supervised = file.startswith("semask") and "unsupervised" not in file
    detector = file.split("swin_tiny_")[-1].split("swin_small_")[-1].removesuffix("_1x")
    kind = ARCHITECTURES.get(detector.removesuffix("_3x"), GeneralizedRCNN)
    assert isinstance(model, kind)
    assert isinstance(model, PriorSupervisedDetector) == supervised
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = losses_of(model, [sample(cfg), sample(cfg, 48, 64)])
    assert ("loss_prior" in losses) == supervised
    assert all(torch.isfinite(value) and value.ndim == 0 for value in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        (output,) = model.eval()([sample(cfg)])
    assert output["instances"].image_size == (32, 40)
    expected = {"pred_boxes", "scores", "pred_classes"}
    expected |= set() if kind is RetinaNet else {"pred_masks"}
    assert set(output["instances"].get_fields()) == expected
    assert output.keys() == (
        {"instances", "sem_seg", "panoptic_seg"} if kind is PanopticFPN else {"instances"}
    )


@pytest.mark.parametrize("name", MASK_MODELS)
def test_each_mask_model_takes_a_step_and_predicts(name: str) -> None:
    cfg = load_config(str(CONFIGS / name), flat({**SMALL_MODEL, **SMALL_MASKS}))
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = max(3, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    torch.manual_seed(0)
    model = build_model(cfg)
    samples = [sample(cfg), sample(cfg, 48, 64)]
    for each in samples:  # a category and the background at least
        each["prior_target"] = each["prior_target"].clamp(max=1)
    losses = losses_of(model, samples)
    supervised = Path(name).stem.startswith("semask") and "unsupervised" not in name
    assert ("loss_prior" in losses) == supervised
    assert all(torch.isfinite(value).all() for value in losses.values())
    sum(losses.values()).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    with torch.no_grad():
        (output,) = model.eval()([sample(cfg)])
    key = {"instance": "instances", "panoptic": "panoptic_seg"}[cfg.TASK]
    assert key in output
    if key == "instances":
        assert output[key].image_size == (32, 40)
    else:
        assert output[key][0].shape == (32, 40)


@pytest.mark.parametrize("network", ["mit_b0", "test_convnext", "test_mambaout"])
@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet", "panoptic_fpn"])
def test_each_detector_takes_networks_of_timm(detector: str, network: str) -> None:
    kind = "retinanet_semask_timm" if detector == "retinanet" else "semask_timm"
    name = f"coco/semask_swin_tiny_{detector}_1x.yaml"
    cfg = config(name, MODEL__BACKBONE__NAME=f"build_{kind}_fpn_backbone")
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.DROP_PATH_RATE = network, 0.0
    torch.manual_seed(0)
    model = build_model(cfg)
    losses = losses_of(model, [sample(cfg), sample(cfg, 40, 60)])
    assert losses["loss_prior"] > 0
    sum(losses.values()).backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    with torch.no_grad():
        (output,) = model.eval()([sample(cfg)])
    assert output["instances"].image_size == (32, 40)
    assert ("panoptic_seg" in output) == (detector == "panoptic_fpn")


def test_every_parameter_gets_a_gradient() -> None:
    """DistributedDataParallel and the optimizer get no unused parameter."""
    for name in (MASK_RCNN, "coco/semask_swin_tiny_retinanet_1x.yaml"):
        cfg = config(name)
        torch.manual_seed(0)
        model = build_model(cfg)
        sum(losses_of(model, [sample(cfg)]).values()).backward()
        assert [key for key, value in model.named_parameters() if value.grad is None] == []


def test_the_loss_is_the_cross_entropy_of_the_summed_priors() -> None:
    cfg = config(MODEL__SEMASK__DROPOUT=0.0, MODEL__SWIN__DROP_PATH_RATE=0.0)
    torch.manual_seed(0)
    model = build_model(cfg)
    batch = [sample(cfg, 64, 96), sample(cfg, 40, 60)]
    batch[0]["prior_target"][:9] = 255
    loss = losses_of(model, batch)["loss_prior"]

    images = model.preprocess_image(batch).tensor
    priors = model.backbone.bottom_up(images)
    total = priors["prior2"]
    for stage, doublings in ((3, 1), (4, 2), (5, 3)):
        grown = priors[f"prior{stage}"]
        for _ in range(doublings):
            grown = F.interpolate(grown, scale_factor=2, mode="bilinear")
        total = total + grown
    total = F.interpolate(total, size=images.shape[-2:], mode="bilinear")
    summed = count = torch.tensor(0.0)
    for logits, inputs in zip(total, batch, strict=True):
        target = inputs["prior_target"]
        height, width = target.shape
        pixels = F.cross_entropy(
            logits[None, :, :height, :width], target[None], ignore_index=255, reduction="sum"
        )
        summed, count = summed + pixels, count + (target != 255).sum()
    torch.testing.assert_close(loss, 0.4 * summed / count)


def test_the_weight_is_the_configs() -> None:
    def prior_loss(weight: float) -> float:
        cfg = config(MODEL__SEM_SEG_HEAD__PRIOR_LOSS_WEIGHT=weight)
        torch.manual_seed(0)
        return float(losses_of(build_model(cfg), [sample(cfg)])["loss_prior"].detach())

    assert config().MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT == 0.4
    assert prior_loss(0.8) == pytest.approx(2 * prior_loss(0.4))


@pytest.mark.parametrize("detector", ARCHITECTURES)
def test_all_else_is_detectron2s(detector: str) -> None:
    """The same losses and predictions as the stock meta-architecture with the same weights."""
    name = f"coco/semask_swin_tiny_{detector}_1x.yaml"
    architecture = ARCHITECTURES[detector].__name__
    cfg = config(name)
    stock_cfg = config(name, MODEL__META_ARCHITECTURE=architecture)
    torch.manual_seed(0)
    model, stock = build_model(cfg), build_model(stock_cfg)
    assert type(stock) is ARCHITECTURES[detector]
    stock.load_state_dict(model.state_dict())  # which have the same names
    batch = [sample(cfg), sample(cfg, 56, 64)]
    losses, expected = losses_of(model, batch), losses_of(stock, batch)
    assert losses.keys() - expected.keys() == {"loss_prior"}
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)
    with torch.no_grad():
        outputs, wanted = model.eval()(batch), stock.eval()(batch)
    for output, other in zip(outputs, wanted, strict=True):
        assert torch.equal(output["instances"].scores, other["instances"].scores)


def test_inference_computes_nothing_of_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    model = build_model(cfg).eval()
    monkeypatch.setattr(SemanticPriorDecoder, "forward", None)
    with torch.no_grad(), outputs_of(model.backbone) as outputs:
        model([{"image": torch.rand(3, 32, 32)}])
    assert outputs.keys() == {"p2", "p3", "p4", "p5", "p6"}


def test_a_batch_without_instances_trains() -> None:
    cfg = config()
    losses = losses_of(build_model(cfg), [sample(cfg, number=0)])
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["loss_prior"] > 0


def test_a_batch_without_any_known_pixel_has_no_prior_loss() -> None:
    cfg = config()
    batch = [sample(cfg)]
    batch[0]["prior_target"].fill_(255)
    assert losses_of(build_model(cfg), batch)["loss_prior"] == 0


def test_activation_checkpointing_changes_nothing() -> None:
    batch_cfg = config()
    gradients = []
    for checkpointed in (False, True):
        cfg = config(MODEL__SWIN__ACTIVATION_CHECKPOINT=[checkpointed] * 4)
        torch.manual_seed(0)
        model = build_model(cfg)
        torch.manual_seed(1)
        batch = [sample(batch_cfg)]
        losses = losses_of(model, batch)
        sum(losses.values()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_no_state_stays_on_the_backbone_even_after_a_failure() -> None:
    cfg = config()
    model = build_model(cfg)
    batch = [sample(cfg)]
    first = losses_of(model, batch)["loss_prior"]
    bad = [{**batch[0], "instances": None}]
    with pytest.raises(AttributeError):
        losses_of(model, bad)
    assert not model.backbone._forward_hooks
    torch.testing.assert_close(losses_of(model, batch)["loss_prior"], first)


def test_forward_passes_of_other_threads_are_not_mixed_up() -> None:
    layer = nn.Linear(1, 1)

    class Backbone(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"prior2": layer(x)}

    backbone = Backbone()
    with outputs_of(backbone) as outputs:
        mine = backbone(torch.ones(1, 1))["prior2"]
        other = threading.Thread(target=backbone, args=(torch.zeros(1, 1),))
        other.start()
        other.join()
    assert outputs["prior2"] is mine


def test_the_pyramid_is_detectron2s_with_the_priors_beside_it() -> None:
    backbone = build_model(config()).backbone
    assert isinstance(backbone, PriorFPN)
    assert isinstance(backbone, SemSegBackbone)
    assert backbone.num_semantic_classes == 3
    assert list(backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    image = torch.rand(1, 3, 64, 96)
    priors = {f"prior{n}" for n in (2, 3, 4, 5)}
    assert backbone.train()(image).keys() == {"p2", "p3", "p4", "p5", "p6"} | priors
    with torch.no_grad():
        plain = backbone.eval()(image)
        asked = backbone(image, return_priors=True)
    assert plain.keys() == {"p2", "p3", "p4", "p5", "p6"}
    assert all(torch.equal(plain[key], asked[key]) for key in plain)
    assert asked["prior3"].shape == (1, 3, 8, 12)


class OwnPyramid(FPN, SemSegBackbone):
    """Its ``output_shape()`` is that of Detectron2's FPN, and it tells no strides of priors."""

    def __init__(self, pyramid: PriorFPN) -> None:
        SemSegBackbone.__init__(self)
        self.pyramid = pyramid
        self.num_semantic_classes = pyramid.num_semantic_classes
        self._out_features = pyramid._out_features
        self._out_feature_channels = pyramid._out_feature_channels
        self._out_feature_strides = pyramid._out_feature_strides

    @property
    def size_divisibility(self) -> int:
        return self.pyramid.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.pyramid.padding_constraints

    def forward(self, image: Tensor, return_priors: bool | None = None) -> dict[str, Tensor]:
        return self.pyramid(image, return_priors)


class OwnPyramidWithStrides(OwnPyramid):
    """It tells the strides."""

    @property
    def prior_strides(self) -> dict[str, int]:
        return self.pyramid.prior_strides


@pytest.mark.parametrize("kind", [OwnPyramid, OwnPyramidWithStrides])
def test_a_pyramid_with_the_output_shape_of_detectron2_supervises_its_priors(
    kind: type[OwnPyramid], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    batch = [sample(cfg)]
    torch.manual_seed(0)
    expected = losses_of(build_model(cfg), batch)["loss_prior"]
    build = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    monkeypatch.setitem(
        BACKBONE_REGISTRY._obj_map, "OwnPyramid", lambda cfg, shape: kind(build(cfg, shape))
    )
    torch.manual_seed(0)
    model = build_model(config(MODEL__BACKBONE__NAME="OwnPyramid"))
    torch.testing.assert_close(losses_of(model, batch)["loss_prior"], expected)


def test_parameters_have_detectron2s_names() -> None:
    names = set(build_model(config()).state_dict())
    assert "backbone.fpn_lateral2.weight" in names
    assert "backbone.bottom_up.encoder.stages.0.blocks.0.attn.qkv.weight" in names
    assert not any("prior_" in name for name in names)
    names = set(build_model(config("coco/semask_swin_tiny_retinanet_1x.yaml")).state_dict())
    assert "backbone.top_block.p6.weight" in names
    assert not any(name.startswith("backbone.fpn_lateral2") for name in names)
    assert not any("output_norms.res2" in name for name in names)


def imagenet_swin(model: nn.Module) -> dict[str, Tensor]:
    """The model's own Swin by the names of an ImageNet checkpoint."""
    prefix = "backbone.bottom_up.encoder."
    renamed = {}
    for name, value in model.state_dict().items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix).removeprefix("stem.").replace("stages.", "layers.")
        if ".downsample." in name:  # of the stage in front of it
            number = int(name.split(".")[1])
            name = name.replace(f"layers.{number}.", f"layers.{number - 1}.")
        renamed[name] = torch.full_like(value, 0.5)
    return {**renamed, "norm.weight": torch.ones(1), "head.weight": torch.ones(1, 1)}


@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet"])
def test_imagenet_checkpoints_start_the_swin_below_the_pyramid(
    tmp_path: Path, detector: str
) -> None:
    model = build_model(config(f"coco/semask_swin_tiny_{detector}_1x.yaml"))
    torch.save({"model": imagenet_swin(model)}, tmp_path / "swin.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    SeMaskCheckpointer(model).load(str(tmp_path / "swin.pth"))
    for name, value in model.state_dict().items():
        other = any(part in name for part in (".semantic_layers.", ".output_norms."))
        if name.startswith("backbone.bottom_up.") and not other:
            assert (value == 0.5).all(), name
        else:
            assert torch.equal(value, before[name]), name


def test_own_checkpoints_come_back(tmp_path: Path) -> None:
    model = build_model(config())
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    other = build_model(config())
    SeMaskCheckpointer(other).load(str(tmp_path / "own.pth"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_target_that_is_missing_or_of_another_size_is_refused() -> None:
    cfg = config()
    model = build_model(cfg)
    for change in ({"prior_target": None}, {"prior_target": torch.zeros(8, 8).long()}):
        with pytest.raises(ValueError, match=r"prior_target.*\(64, 80\)"):
            losses_of(model, [{**sample(cfg), **change}])


@pytest.mark.parametrize("target", ["instances", "sem_seg"])
def test_the_classes_follow_the_target(target: str) -> None:
    wanted = {"instances": 3, "sem_seg": 17}[target]
    keys: dict[str, Any] = {
        "MODEL__SEMASK__PRIOR_TARGET": target,
        "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 17,
    }
    assert build_model(config(**keys)).backbone.num_semantic_classes == wanted
    build_model(config(**keys, MODEL__SEMASK__NUM_CLASSES=wanted))
    with pytest.raises(ConfigError, match=f"NUM_CLASSES is 5.*has {wanted} classes"):
        build_model(config(**keys, MODEL__SEMASK__NUM_CLASSES=5))


def test_what_cannot_supervise_is_refused_when_it_is_built() -> None:
    with pytest.raises(ConfigError, match="LOSS_REDUCTION"):
        build_model(config(MODEL__SEM_SEG_HEAD__LOSS_REDUCTION="some"))
    with pytest.raises(ConfigError, match="IGNORE_VALUE 1"):
        build_model(config(MODEL__SEM_SEG_HEAD__IGNORE_VALUE=1))
    levels = ["res2", "res3", "res4", "res5"]
    cfg = config(
        MODEL__BACKBONE__NAME="build_resnet_fpn_backbone", MODEL__RESNETS__OUT_FEATURES=levels
    )
    with pytest.raises(ConfigError, match="prior maps"):
        build_model(cfg)


def test_more_classes_than_a_byte_holds_train_without_the_priors_loss() -> None:
    with pytest.raises(ConfigError, match=r"has 301 classes.*PRIOR_LOSS_WEIGHT 0"):
        build_model(config(MODEL__ROI_HEADS__NUM_CLASSES=300))
    cfg = config(MODEL__ROI_HEADS__NUM_CLASSES=300, MODEL__SEM_SEG_HEAD__PRIOR_LOSS_WEIGHT=0.0)
    assert "loss_prior" not in losses_of(build_model(cfg), [sample(cfg)])


def test_the_striped_loss_is_the_plain_one() -> None:
    losses = []
    for paths in ("none", "striped_loss"):
        cfg = config(MODEL__FAST_PATHS=paths)
        torch.manual_seed(0)
        model = apply_fast_paths(build_model(cfg).train(), select_fast_paths(cfg))
        striped = isinstance(model.prior_supervision.loss, StripedSegmentationLoss)
        assert striped == (paths != "none")
        torch.manual_seed(0)
        losses.append(losses_of(model, [sample(cfg), sample(cfg, 96, 64)])["loss_prior"])
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)


def test_detectors_are_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(SOLVER__COMPILE=True)
    assert compile_for_training(cfg, nn.Identity(), Precision()) is None
    assert "SOLVER.COMPILE: TASK 'instance'" in caplog.text
