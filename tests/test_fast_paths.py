"""The table of faster forms, the key that selects them, and the log line that lists them."""

import argparse
import copy
import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

import tiny
import tiny_masks
import tiny_model
from largest import Largest
from plain_comparison import assert_close, assert_equal_gradients, assert_equal_predictions
from process_state import snapshot
from semask import Predictor
from semask.config.loading import load_config
from semask.engine import Trainer
from semask.engine.launch import run_setup
from semask.errors import ConfigError
from semask.modeling import SeMaskSwin
from semask.modeling.heads import SemanticFPNDecoder
from semask.modeling.layers.resize import resize
from semask.ops import (
    apply,
    deformable_attention,
    malloc,
    mask_losses,
    pixel_decoder,
    products,
    semantic_fpn,
    semantic_layer,
    stripes,
    window,
)
from semask.ops.apply import (
    FAST_PATHS,
    apply_fast_paths,
    select_fast_paths,
)
from semask.ops.malloc import can_keep_memory
from semask.solver import build_optimizer


def config(tmp_path: Path, *overrides: Any) -> Any:
    values = [str(value) for value in ("MODEL.DEVICE", "cpu", *overrides)]
    return load_config(tiny.write_config(tmp_path / "config.yaml"), values)


def test_automatic_choice(tmp_path: Path) -> None:
    everywhere = {"striped_loss", "fused_optimizer", "gathered", "split", "folded"}
    everywhere |= {"early_sum", "streamed", "levelled", "factored"}
    on_cpu = everywhere | {"winograd", "chunked", "recomputed", "bagged", "pointwise"}
    on_cpu |= {"kept_memory"} if can_keep_memory() else set()
    assert select_fast_paths(config(tmp_path)) >= on_cpu
    assert "sdpa" not in select_fast_paths(config(tmp_path))
    on_gpu = select_fast_paths(config(tmp_path, "MODEL.DEVICE", "cuda"))
    assert on_gpu >= everywhere | {"sdpa"}
    assert not on_gpu & (on_cpu - everywhere)


def test_mixed_precision_in_training_leaves_the_choice_as_it_is(tmp_path: Path) -> None:
    """Evaluation does not autocast."""
    mixed = config(tmp_path, "SOLVER.AMP.ENABLED", True)
    assert select_fast_paths(mixed) == select_fast_paths(config(tmp_path))


def test_key_overrides_the_choice(tmp_path: Path) -> None:
    assert select_fast_paths(config(tmp_path, "MODEL.FAST_PATHS", "none")) == set()
    some = config(tmp_path, "MODEL.FAST_PATHS", "sdpa, winograd")
    assert select_fast_paths(some) == {"sdpa", "winograd"}
    with pytest.raises(ConfigError, match=r"MODEL\.FAST_PATHS.*'quick'"):
        select_fast_paths(config(tmp_path, "MODEL.FAST_PATHS", "sdpa,quick"))


def test_the_forms_in_the_model_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Enabled forms that the model does not have, such as those of mask decoders, are not
    logged.
    """
    with caplog.at_level(logging.INFO, logger="semask"):
        model = Trainer.build_model(config(tmp_path))
    (line,) = [record.getMessage() for record in caplog.records if record.name == apply.__name__]
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    there = {name for name, path in FAST_PATHS.items() if classes & set(path.forms.values())}
    assert {"striped_loss", "winograd", "streamed", "recomputed"} <= there
    assert not there & {"levelled", "factored", "bagged", "kept_memory", "fused_optimizer"}
    for name, path in FAST_PATHS.items():
        assert (f"{name} ({path.does})" in line) == (name in there)


def test_none_is_exactly_the_plain_classes(tmp_path: Path) -> None:
    model = Trainer.build_model(config(tmp_path, "MODEL.FAST_PATHS", "none"))
    for name, module in model.named_modules():
        assert not type(module).__module__.startswith("semask.ops"), name
    chosen = Trainer.build_model(config(tmp_path))
    assert any(type(module).__module__.startswith("semask.ops") for module in chosen.modules())


@pytest.mark.parametrize("setting", ["auto", "none"])
def test_optimizer_is_fused_where_chosen(tmp_path: Path, setting: str) -> None:
    cfg = config(tmp_path, "MODEL.FAST_PATHS", setting)
    optimizer = build_optimizer(cfg, build_model(cfg))
    assert bool(optimizer.defaults["fused"]) == (setting == "auto")


def test_building_has_no_effect_on_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the allocator was told something")

    monkeypatch.setattr(malloc, "ctypes", SimpleNamespace(CDLL=refuse))
    cfg = config(tmp_path, "MODEL.FAST_PATHS", "kept_memory")
    Trainer.build_model(cfg)
    weights = tiny_model.checkpoint(tmp_path)
    before = snapshot()
    Predictor(cfg, weights)
    assert snapshot() == before


@pytest.mark.parametrize("setting", ["none", "kept_memory"])
def test_a_run_keeps_freed_memory_where_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(run_setup, "keep_freed_memory", lambda: calls.append("called"))
    cfg = config(tmp_path, "MODEL.FAST_PATHS", setting, "OUTPUT_DIR", tmp_path / "run")
    (tmp_path / "run").mkdir()
    with tiny.own_loggers():
        run_setup.set_up_run(cfg, argparse.Namespace(eval_only=True))
    assert calls == (["called"] if setting == "kept_memory" else [])


# Whole models with images of odd sizes. Each plain class that has a form is in one of them.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "whole": {},
    "multi_scale": {"PROTOCOL": "multi_scale"},
    "slide": {"PROTOCOL": "slide", "SLIDE_CROP": [30, 24], "SLIDE_STRIDE": [20, 16]},
}
CASES = (*PROTOCOLS, "mask2former")
FPN = {
    "META_ARCHITECTURE": "SeMaskSegmentor",
    "SEM_SEG_HEAD__NAME": "SeMaskFPNHead",
    "SEM_SEG_HEAD__NORM": "BN",
}
# oneDNN multiplies in float32 alone; every other form is compared in float64.
IN_FLOAT32 = ("onednn",)


def plain_model(case: str, frozen: int = 0) -> Any:
    """Build a model whose parts all have an effect, and which draws no random numbers for dropout.

    Stochastic depth is on.
    """
    torch.manual_seed(1)
    settings: dict[str, Any] = {"SWIN__FREEZE_AT": frozen, "SWIN__DROP_PATH_RATE": 0.3}
    settings |= FPN if case in PROTOCOLS else {"MASK_FORMER__DECODER": case}
    cfg = tiny_masks.config(**settings)
    for key, value in PROTOCOLS.get(case, {}).items():
        cfg.merge_from_list([f"TEST.{key}", value])
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "class_embed.weight", "mask_embed.layers.2.weight")):
            nn.init.normal_(parameter)
        if name.endswith("sampling_offsets.bias"):  # at whole tokens there are two gradients
            nn.init.uniform_(parameter, -3, 3)
    for part in model.modules():
        part.p = 0.0
    return model


@functools.cache
def plain_classes(case: str) -> frozenset[type[nn.Module]]:
    return frozenset(type(module) for module in plain_model(case).modules())


def case_with(plain_class: type[nn.Module]) -> str:
    """The first of ``CASES`` with a module of a class."""
    for case in CASES:
        if plain_class in plain_classes(case):
            return case
    pytest.fail(f"no case of CASES has a {plain_class.__name__}: add one")


def assert_same_numbers(fast: Any, plain: Any) -> None:
    """Losses, gradients, statistics and scores."""
    dtype = next(plain.parameters()).dtype
    samples = tiny_masks.batch((45, 62), (45, 62))
    losses = []
    for model in (fast, plain):
        torch.manual_seed(1)  # of stochastic depth and of the points of masks
        losses.append(model.train()(samples))
        sum(losses[-1].values()).backward()
    for name, want in losses[1].items():
        assert_close(losses[0][name], want, name)
    assert losses[0].keys() == losses[1].keys()
    assert_equal_gradients(fast, plain)
    for (name, got), (_, want) in zip(fast.named_buffers(), plain.named_buffers(), strict=True):
        if want.is_floating_point():
            assert_close(got, want, name)
    for sample in samples:
        image = sample["image"].to(dtype)
        sample["images"] = [image, resize(image[None], (33, 50))[0]]
    assert_equal_predictions(fast, plain, samples)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of the forms that divide their work are below the sizes of the tests."""
    monkeypatch.setattr(window, "CHUNK_TOKENS", 40)
    monkeypatch.setattr(semantic_layer, "SIMILARITY_BYTES", 2000)
    monkeypatch.setattr(semantic_fpn, "BAND_BYTES", 2000)
    monkeypatch.setattr(pixel_decoder, "CHUNK_TOKENS", 40)
    monkeypatch.setattr(deformable_attention, "CHUNK_QUERIES", 40)
    monkeypatch.setattr(mask_losses, "TARGET_BYTES", 2000)
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setitem(stripes.STRIPE_BYTES, "cpu", 1000)


@pytest.mark.usefixtures("small_parts", "one_thread")
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize(
    ("name", "plain_class"),
    [(name, plain) for name, path in FAST_PATHS.items() for plain in path.forms],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_form_gives_the_same_numbers(
    name: str, plain_class: type[nn.Module], frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a whole model that contains the plain class, for every entry of the table."""
    if name == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    plain = plain_model(case_with(plain_class), frozen)
    plain = plain.to(torch.float32 if name in IN_FLOAT32 else torch.float64)
    fast = apply_fast_paths(copy.deepcopy(plain), {name})
    form = FAST_PATHS[name].forms[plain_class]
    assert any(type(module) is form for module in fast.modules())
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert_same_numbers(fast, plain)


@pytest.mark.usefixtures("small_parts", "one_thread")
@pytest.mark.parametrize("case", CASES)
def test_all_forms_together_give_the_same_numbers(case: str) -> None:
    plain = plain_model(case).double()
    fast = apply_fast_paths(copy.deepcopy(plain), FAST_PATHS)
    classes = {kind for module in fast.modules() for kind in type(module).__mro__}
    for path in FAST_PATHS.values():
        for each, form in path.forms.items():
            assert (form in classes) == (each in plain_classes(case)), form
    assert [name for name, _ in fast.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert_same_numbers(fast, plain)


def test_what_is_no_module_has_a_test_of_its_own() -> None:
    """See ``test_the_fused_update_is_the_same`` and ``test_kept_memory_is_not_fetched_again``."""
    without = {name for name, path in FAST_PATHS.items() if not path.forms}
    assert without == {"fused_optimizer", "kept_memory"}


def test_the_fused_update_is_the_same(tmp_path: Path) -> None:
    weights = []
    for setting in ("none", "fused_optimizer"):
        cfg = config(tmp_path, "MODEL.FAST_PATHS", setting)
        torch.manual_seed(0)
        model = build_model(cfg).double()
        optimizer = build_optimizer(cfg, model)
        assert bool(optimizer.defaults["fused"]) == (setting != "none")
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        weights.append(dict(model.named_parameters()))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not can_keep_memory(), reason="needs glibc")
def test_kept_memory_is_not_fetched_again() -> None:
    """In a process of its own, as it cannot be undone."""
    script = """
import resource, torch
from semask.ops.malloc import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.ones(2)
print(faults(), end=" ")
keep_freed_memory()
print(min(faults() for _ in range(5)))  # a hole of the right size takes some rounds to form
"""
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    before, after = map(int, result.stdout.split())
    assert before > 100  # pages of 4 KiB, or of 64
    assert after < before / 10


def test_a_model_is_saved_whole_and_read_in_another_process(tmp_path: Path) -> None:
    cfg = load_config(tiny.write_config(tmp_path / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    model = apply_fast_paths(build_model(cfg), set(FAST_PATHS)).eval()
    inputs = [{"image": torch.rand(3, 37, 53) * 255, "height": 37, "width": 53}]
    with torch.no_grad():
        expected = model(inputs)[0]["sem_seg"]
    torch.save({"model": model, "inputs": inputs, "expected": expected}, tmp_path / "model.pth")
    code = (
        "import semask, sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    found = saved['model'](saved['inputs'])[0]['sem_seg']\n"
        "torch.testing.assert_close(found, saved['expected'])\n"
        "print([type(module).__name__ for module in saved['model'].modules()])"
    )
    root = Path(apply.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pth")],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = [type(module).__name__ for module in model.modules()]
    assert done.stdout.strip() == str(names)
    assert "FastSwinBlock" in names  # a combination of several forms


def test_evaluation_holds_no_hidden_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """No created tensor is larger than the features, whatever the layers' own width."""
    monkeypatch.setattr(window, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(semantic_layer, "SIMILARITY_BYTES", 1)
    monkeypatch.setattr(semantic_fpn, "BAND_BYTES", 1)
    backbone = SeMaskSwin(
        embed_dim=8,
        num_heads=(1, 2, 4, 8),
        window_size=4,
        semantic_classes=5,
    ).eval()
    head = SemanticFPNDecoder(
        input_shape=backbone.output_shape(), num_classes=5, conv_dims=24, norm="BN"
    ).eval()
    for part in (backbone, head):
        apply_fast_paths(part, set(FAST_PATHS) - {"winograd"})
    image = torch.randn(1, 3, 256, 256)
    with torch.inference_mode(), Largest() as largest:
        head(backbone(image))
    assert largest.values == 64 * 64 * 8
