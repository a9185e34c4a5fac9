"""Parameters, operations and saved activations of whole models and of their modules."""

import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn

import tiny
import tiny_masks
from semask import config_path
from semask.cli import main
from semask.config.loading import load_config
from semask.engine.analysis import ModelCost, analyze_model, saved_bytes
from semask.errors import ConfigError
from semask.modeling import SeMaskFPNHead
from tiny_instances import SMALL_MODEL, flat

# arXiv 2112.12782 and 2103.14030: GFLOP of one inference with 150 classes, by size of the image.
GFLOP = {
    ("semask_swin_tiny_fpn", 512): 83.08,
    ("semask_swin_small_fpn", 512): 130.51,
    ("semask_swin_base_fpn", 512): 228.60,
    ("semask_swin_large_fpn", 512): 469.63,
    ("semask_swin_large_fpn", 640): 746.02,
    ("swin_tiny_fpn", 512): 76.73,
    ("swin_small_fpn", 512): 124.16,
    ("swin_base_fpn", 512): 217.00,
    ("swin_large_fpn", 512): 450.60,
    ("swin_large_fpn", 640): 715.06,
}
run = functools.partial(main.run, "analyze")
FAST = {("semask_swin_tiny_fpn", 512), ("semask_swin_large_fpn", 640), ("swin_tiny_fpn", 512)}


def shipped(name: str) -> CfgNode:
    return load_config(config_path(f"ade20k/{name}"))


def tiny_config(tmp_path: Path, **sections: Any) -> CfgNode:
    return load_config(tiny.write_config(tmp_path / "config.yaml", **sections))


def padding_flops(name: str, side: int) -> int:
    """What the definition spends on q, k, v and the projection of padded tokens, and we do not;
    less the one token whose q, k, v serve all of the padding."""
    swin = shipped(name).MODEL.SWIN
    total = 0
    for stage, depth in enumerate(swin.DEPTHS):
        tokens, dim = side // 4 // 2**stage, swin.EMBED_DIM * 2**stage
        padded = math.ceil(tokens / swin.WINDOW_SIZE) * swin.WINDOW_SIZE
        total += depth * 2 * dim * dim * (4 * (padded**2 - tokens**2) - 3)
    return total


@pytest.mark.parametrize(
    ("name", "side"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in GFLOP],
)
def test_operations_of_the_published_models(name: str, side: int) -> None:
    counted = analyze_model(shipped(name), (side, side)).modules[""].flops
    total = counted + padding_flops(name, side)
    assert total / 1e9 == pytest.approx(GFLOP[name, side], abs=0.006)


@pytest.fixture(scope="module")
def semask_tiny() -> ModelCost:
    return analyze_model(shipped("semask_swin_tiny_fpn"))


def test_shares_of_the_modules(semask_tiny: ModelCost) -> None:
    modules = semask_tiny.modules
    assert (semask_tiny.height, semask_tiny.width) == (512, 512)  # the training crop
    padding = padding_flops("semask_swin_tiny_fpn", 512) / 1e9
    assert modules[""].flops / 1e9 == pytest.approx(83.08 - padding, abs=0.006)
    assert modules["backbone"].flops / 1e9 == pytest.approx(57.36 - padding, abs=0.006)
    assert modules["sem_seg_head"].flops / 1e9 == pytest.approx(25.72, abs=0.006)
    assert modules["backbone"].flops + modules["sem_seg_head"].flops == modules[""].flops
    assert len(semask_tiny.semantic_layers) == 4
    semantic = semask_tiny.sum_of(semask_tiny.semantic_layers)
    assert semantic.flops / 1e9 == pytest.approx(6.35, abs=0.006)
    assert modules[""].parameters == 34_655_748
    assert modules["backbone"].parameters == 29_526_382
    # The plain Swin-FPN has fewer by the semantic layers.
    assert modules[""].parameters - semantic.parameters == 32_650_064
    # An MLP by hand: 128 x 128 tokens, 96 -> 384 -> 96 channels.
    assert modules["backbone.encoder.stages.0.blocks.0.mlp"].flops == 2 * 128 * 128 * 2 * 96 * 384


def test_saved_activations_of_the_modules(semask_tiny: ModelCost) -> None:
    modules = semask_tiny.modules
    parts = sum(modules[name].saved_bytes for name in ("backbone", "sem_seg_head"))
    assert modules[""].saved_bytes == parts
    assert 500 * 2**20 < modules[""].saved_bytes < 2000 * 2**20


def test_table_lists_and_states_what_it_counts(semask_tiny: ModelCost) -> None:
    table = semask_tiny.table(depth=1)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    assert [row[0] for row in rows[2:]] == [
        "(whole model)",
        "backbone",
        "sem_seg_head",
        "(all semantic layers)",
    ]
    assert rows[2][1:3] == ["34,655,748", "79.25"]  # 83.08 less what padding costs
    assert "two operations per multiply-add" in table
    assert "512x512" in table
    assert "backbone.encoder" in semask_tiny.table(depth=2)


class _Wrapped(nn.Module):
    """A segmentor with the plain tensors that tracing needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model([{"image": image}])[0]["sem_seg"]


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (get_shape(item) for item in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _batched_product(inputs: list[Any], outputs: list[Any]) -> int:
    """Of ``baddbmm``, whose first input is what is added."""
    first, second = (get_shape(item) for item in inputs[1:3])
    return math.prod(first) * second[-1]


def test_counts_as_fvcore_does(tmp_path: Path) -> None:
    """fvcore has to run the model, so it is asked about a small one."""
    cfg = tiny_config(tmp_path, MODEL={"DEVICE": "cpu", "FAST_PATHS": "none"})
    counter = FlopCountAnalysis(
        _Wrapped(build_model(cfg).eval()), (torch.zeros(3, 40, 56),)
    ).ancestor_mode("owner")
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counter.set_op_handle("aten::scaled_dot_product_attention", _attention)
    counter.set_op_handle("aten::baddbmm", _batched_product)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = counter.by_module_and_operator()
    kinds = {"conv", "linear", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention"}
    for name, cost in analyze_model(cfg, (40, 56)).modules.items():
        counts = theirs[f"model.{name}" if name else "model"]
        # fvcore counts a multiply-add as one operation.
        assert cost.flops == 2 * sum(counts[kind] for kind in kinds), name


class _Mlp(nn.Module):
    """Keeps, by hand: its input, the first layer's output once (ReLU's output is also the second
    layer's input), and what the loss needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([item["image"].flatten(1).T for item in inputs])
        return {"loss": self.second(self.first(pixels).relu()).sum()}


def test_saved_bytes_by_hand() -> None:
    saved, peak = saved_bytes(_Mlp(), [{"image": torch.zeros(3, 5, 7)}] * 2)
    assert peak is None
    pixels = 2 * 5 * 7
    assert sum(saved.values()) == 4 * pixels * (3 + 8)
    assert saved["first"] == 4 * pixels * 3
    assert saved["second"] + saved[""] == 4 * pixels * 8


def test_recomputing_saves_memory_and_nothing_else(tmp_path: Path) -> None:
    plain = analyze_model(tiny_config(tmp_path), batch_size=2)
    checkpointed = analyze_model(
        tiny_config(tmp_path, MODEL={"SWIN": {"ACTIVATION_CHECKPOINT": [True, True]}}), batch_size=2
    )
    assert checkpointed.modules["backbone"].saved_bytes < plain.modules["backbone"].saved_bytes / 2
    for name, cost in plain.modules.items():
        other = checkpointed.modules[name]
        assert (cost.flops, cost.parameters) == (other.flops, other.parameters)


def test_batch_multiplies_what_is_saved(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    one, four = (analyze_model(cfg, batch_size=number).modules[""] for number in (1, 4))
    assert one.flops == four.flops
    assert 3 * one.saved_bytes < four.saved_bytes <= 4 * one.saved_bytes


def test_on_the_cpu_a_step_is_really_run(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    real, shapes = analyze_model(cfg, device="cpu"), analyze_model(cfg)
    assert real.device == "cpu"
    assert "On 'meta' nothing is computed" not in real.table()
    head = "sem_seg_head.semantic_fpn"  # the same operations on both
    assert real.modules[head].saved_bytes == shapes.modules[head].saved_bytes
    assert 0 < real.modules[""].saved_bytes <= shapes.modules[""].saved_bytes * 1.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_the_peak_is_measured(tmp_path: Path) -> None:
    cost = analyze_model(tiny_config(tmp_path), device="cuda")
    assert cost.peak_bytes is not None
    assert cost.peak_bytes > cost.modules[""].saved_bytes
    assert "Peak GPU memory" in cost.table()


def test_config_is_not_changed(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    cfg.freeze()
    before = cfg.dump()
    analyze_model(cfg)
    assert cfg.dump() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (0, 8)}, "8x0 pixels"),
        ({"batch_size": 0}, "0 image"),
        ({"device": "abacus"}, "cannot be built on 'abacus'"),
    ],
)
def test_what_cannot_be_analysed(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        analyze_model(tiny_config(tmp_path), **arguments)


@pytest.mark.parametrize("of", [tiny, tiny_masks])
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], of: Any) -> None:
    file = of.write_config(tmp_path / "config.yaml")
    assert run([file, "--size", "32", "64", "--json", "MODEL.SWIN.EMBED_DIM", "16"]) == 0
    written = json.loads(capsys.readouterr().out)
    device = "meta" if of is tiny else "cpu"  # matching needs values
    assert (written["height"], written["width"], written["device"]) == (32, 64, device)
    assert written["modules"]["backbone"]["flops"] > 0
    # Two pixels at stride 32, which the norm of the mask decoder needs.
    size = [] if of is tiny else ["--size", "32", "64"]
    assert run([file, "--depth", "1", *size]) == 0
    assert "| sem_seg_head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["{file}", "MODEL.SWIM.EMBED_DIM", "3"], "MODEL.SWIN"),
        (["{file}", "MODEL.SWIN.NUM_HEADS", "[3, 2]"], "NUM_HEADS"),
        (["{file}", "--size", "8", "-1"], "-1x8 pixels"),
    ],
)
def test_mistakes_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    file = tiny.write_config(tmp_path / "config.yaml")
    assert run([argument.format(file=file) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("ConfigError: ")
    assert printed.out == ""


DETECTORS = ("mask_rcnn", "cascade_mask_rcnn", "retinanet", "panoptic_fpn")


def detector(architecture: str, **more: Any) -> CfgNode:
    overrides = {**SMALL_MODEL, "TEST.DETECTIONS_PER_IMAGE": 4, **more}
    name = config_path(f"coco/semask_swin_tiny_{architecture}_1x")
    return load_config(name, flat(overrides))


@pytest.mark.parametrize("architecture", DETECTORS)
def test_detectors(architecture: str) -> None:
    cost = analyze_model(detector(architecture), (96, 128), batch_size=2)
    assert (cost.height, cost.width, cost.device) == (96, 128, "cpu")
    assert len(cost.semantic_layers) == 4
    heads = "head" if architecture == "retinanet" else "roi_heads"
    for name in ("", "backbone.bottom_up", heads):
        counted = cost.modules[name]
        assert min(counted.parameters, counted.flops, counted.saved_bytes) > 0, name
    if architecture == "panoptic_fpn":
        assert cost.modules["sem_seg_head"].flops > 0


def test_a_mask_is_counted_for_each_allowed_detection() -> None:
    few = analyze_model(detector("mask_rcnn"), (96, 128))
    many = analyze_model(detector("mask_rcnn", **{"TEST.DETECTIONS_PER_IMAGE": 8}), (96, 128))
    mask_head = "roi_heads.mask_head"
    assert many.modules[mask_head].flops == 2 * few.modules[mask_head].flops > 0


def test_a_head_whose_losses_need_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config(tmp_path)
    assert analyze_model(cfg).device == "meta"
    monkeypatch.setattr(SeMaskFPNHead, "losses_need_values", True)
    assert analyze_model(cfg).device == "cpu"
    with pytest.raises(ConfigError, match="'meta'"):
        analyze_model(cfg, device="meta")


def test_sizes_and_devices_of_detectors() -> None:
    cfg = detector("retinanet", **{"INPUT.MIN_SIZE_TRAIN": (32, 64), "INPUT.MAX_SIZE_TRAIN": 96})
    cost = analyze_model(cfg)
    assert (cost.height, cost.width) == (64, 96)
    with pytest.raises(ConfigError, match="'meta'"):
        analyze_model(cfg, device="meta")


# ---- mask classification ----


@pytest.mark.parametrize("decoder", tiny_masks.DECODERS)
def test_mask_classification(decoder: str) -> None:
    cfg = tiny_masks.config(decoder)
    cost = analyze_model(cfg, (64, 96))
    assert cost.device == "cpu"  # matching needs values
    modules = cost.modules
    parts = ("backbone", "sem_seg_head.pixel_decoder", "sem_seg_head.predictor")
    assert all(min(modules[part].flops, modules[part].parameters) > 0 for part in parts)
    assert modules["sem_seg_head"].flops == sum(modules[part].flops for part in parts[1:])
    scores = 2 * 6 * tiny_masks.CLASSES * 64 * 96  # queries' classes times their masks
    network = modules["backbone"].flops + modules["sem_seg_head"].flops
    assert modules[""].flops == network + scores
    assert modules[""].saved_bytes > 0
    with pytest.raises(ConfigError, match="'meta'"):
        analyze_model(cfg, (64, 96), device="meta")


def test_the_sampling_of_deformable_attention_counts() -> None:
    name = "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn"
    flops = analyze_model(tiny_masks.config(), (64, 96)).modules[name].flops
    tokens, channels = 2 * 3 + 4 * 6 + 8 * 12, 32
    samples = 3 * 4  # levels and points of each head
    products = 2 * tokens * channels * (2 * channels + 8 * samples * 3)
    assert flops == products + 8 * tokens * channels * samples


def test_deformable_convolutions_count() -> None:
    modules = analyze_model(tiny_masks.config("mask2former_fapn"), (64, 96)).modules
    (last,) = [name for name in modules if name.endswith("align_1.dcpack_L2")]
    pixels, channels, taps, groups = 16 * 24, 32, 9, 8
    offsets = 2 * pixels * channels * taps * (3 * groups * taps)
    sampled = 8 * pixels * channels * taps
    assert modules[last].flops == offsets + sampled + 2 * pixels * channels * channels * taps
