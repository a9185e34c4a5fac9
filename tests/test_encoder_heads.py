"""Networks of timm with every decoder and task: losses, predictions, export, costs.

Detectors: ``test_detectors.py``. The networks alone: ``test_timm_encoder.py``.
"""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tiny_masks
from semask.engine.analysis import analyze_model
from semask.inference.export import save_onnx, save_program
from semask.inference.parity import compare_export
from semask.modeling import MaskClassificationHead, SeMaskTimm
from semask.ops.apply import apply_fast_paths, select_fast_paths
from semask.solver import build_optimizer

# Channels first with attention, channels first, channels last.
NETWORKS = pytest.mark.parametrize("network", ["mit_b0", "test_convnext", "test_mambaout"])
# Every registered head: those of one decoder by their name, the others by that of the decoder.
PER_PIXEL = tuple(
    name
    for name, head in SEM_SEG_HEADS_REGISTRY
    if head.__module__.startswith("semask.") and head is not MaskClassificationHead
)
HEADS = (*PER_PIXEL, *tiny_masks.DECODERS)
# No multiples of 32.
SIZE = (40, 52)

pytestmark = pytest.mark.usefixtures("one_thread")


def config(network: str, head: str = "SeMaskFPNHead", **overrides: Any) -> CfgNode:
    settings = {"BACKBONE__NAME": "SeMaskTimm", "TIMM__NAME": network, **overrides}
    if head in tiny_masks.DECODERS:
        return tiny_masks.config(head, **settings)
    per_pixel = {
        "META_ARCHITECTURE": "SeMaskSegmentor",
        "SEM_SEG_HEAD__NAME": head,
        "SEM_SEG_HEAD__NORM": "BN",
    }
    return tiny_masks.config(**per_pixel, **settings)


def build(cfg: CfgNode) -> Any:
    """Build a model with effective semantic attention."""
    torch.manual_seed(1)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma") and "semantic_layers" in name:
            nn.init.ones_(parameter)
    return apply_fast_paths(model, select_fast_paths(cfg))


@NETWORKS
@pytest.mark.parametrize("head", HEADS)
def test_every_registered_head_takes_a_step_and_predicts(head: str, network: str) -> None:
    cfg = config(network, head)
    model = build(cfg).train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    batch = tiny_masks.batch(SIZE, SIZE)
    losses = model(batch)
    assert losses["loss_prior"] > 0
    sum(losses.values()).backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    build_optimizer(cfg, model).step()
    changed = {key for key, value in model.named_parameters() if not value.equal(before[key])}
    parts = ("backbone.encoder.", "backbone.semantic_layers.", "sem_seg_head.")
    assert all(any(key.startswith(part) for key in changed) for part in parts)
    with torch.no_grad():
        (output,) = model.eval()(batch[:1])
        outputs = model.backbone(torch.randn(1, 3, 64, 96), return_priors=True)
    # The size that the batch asks for.
    assert output["sem_seg"].shape == (tiny_masks.CLASSES, SIZE[0] + 9, SIZE[1] - 3)
    assert output["sem_seg"].isfinite().all()
    for level in range(2, 6):
        size = (64 // 2**level, 96 // 2**level)
        assert outputs[f"res{level}"].shape[2:] == size
        assert outputs[f"prior{level}"].shape == (1, tiny_masks.CLASSES, *size)


@NETWORKS
def test_masks_are_instances_and_panoptic_segments(network: str, catalogs: None) -> None:
    keys: dict[str, Any] = {
        f"MASK_FORMER__TEST__{task}_ON": True for task in ("INSTANCE", "PANOPTIC")
    }
    keys |= {"MASK_FORMER__TEST__OBJECT_MASK_THRESHOLD": 0.0}
    cfg = config(network, "mask2former", **keys)
    cfg.DATASETS.TRAIN = ("encoder_heads_panoptic",)
    MetadataCatalog.get(*cfg.DATASETS.TRAIN).set(thing_dataset_id_to_contiguous_id={0: 0, 1: 1})
    batch = tiny_masks.batch(SIZE)
    with torch.no_grad():
        (output,) = build(cfg).eval()(batch)
    size = (batch[0]["height"], batch[0]["width"])
    assert output["instances"].image_size == output["panoptic_seg"][0].shape == size
    assert len(output["instances"]) > 0


@NETWORKS
def test_frozen_and_recomputed_stages_in_a_whole_model(network: str) -> None:
    def step(**settings: Any) -> tuple[Any, dict[str, Any]]:
        keys = {"SEMASK__DROPOUT": 0.0, "SEM_SEG_HEAD__DROPOUT": 0.0, **settings}
        model = build(config(network, **keys)).train()
        losses = model(tiny_masks.batch(SIZE, SIZE))
        sum(losses.values()).backward()
        return losses, {key: value.grad for key, value in model.named_parameters()}

    plain = step()
    torch.testing.assert_close(step(TIMM__ACTIVATION_CHECKPOINT=[True] * 4), plain)
    losses, gradients = step(TIMM__FREEZE_AT=2)
    frozen = {key for key, value in gradients.items() if value is None}
    assert frozen < {key for key in gradients if key.startswith("backbone.")}
    assert any(".semantic_layers.res2." in key for key in frozen)
    assert all(value.isfinite() for value in losses.values())


def difference(model: nn.Module, path: Path) -> float:
    (parity,) = compare_export(model, [(1, *SIZE)], path)
    return parity.largest_difference


@NETWORKS
def test_export_equals_the_model(network: str, tmp_path: Path) -> None:
    model = build(config(network)).eval()
    save_program(model, SIZE, tmp_path / "model.pt2")
    assert difference(model, tmp_path / "model.pt2") < 1e-4


@pytest.mark.slow
def test_onnx_equals_the_model(tmp_path: Path) -> None:
    for package in ("onnxscript", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    model = build(config("mit_b0")).eval()
    save_onnx(model, SIZE, tmp_path / "model.onnx")
    assert difference(model, tmp_path / "model.onnx") < 1e-4


@NETWORKS
def test_operations_are_those_of_the_network(network: str) -> None:
    modules = analyze_model(config(network), (64, 64)).modules
    with torch.device("meta"):
        features = timm.create_model(network, features_only=True).eval()
        encoder = SeMaskTimm(name=network, semantic_attention=["none"] * 4).encoder
        image = torch.empty(1, 3, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features(image)
    assert modules["backbone.encoder"].flops == counter.get_total_flops() > 0
    expected = sum(parameter.numel() for parameter in encoder.parameters())
    assert modules["backbone.encoder"].parameters == expected
    assert modules["backbone.semantic_layers"].flops > 0
