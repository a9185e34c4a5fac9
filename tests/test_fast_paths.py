"""The table of faster forms, the key that selects them, and the log line that lists them."""

import argparse
import copy
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
import tiny_model
from largest import Largest
from semask import Predictor
from semask.config.loading import load_config
from semask.engine import Trainer
from semask.engine.launch import run_setup
from semask.errors import ConfigError
from semask.modeling import SeMaskSwin
from semask.modeling.heads import SemanticFPNDecoder
from semask.ops import apply, malloc, semantic_fpn, semantic_layer, stripes, window
from semask.ops.apply import FAST_PATHS, apply_fast_paths, select_fast_paths
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
    Predictor(cfg, tiny_model.checkpoint(tmp_path))


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


@pytest.mark.parametrize("setting", ["auto", *FAST_PATHS])
@pytest.mark.parametrize("frozen", [0, 2])
def test_every_form_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, frozen: int
) -> None:
    """Losses, gradients and scores; images of odd sizes, two in a batch, as a batch."""
    monkeypatch.setattr(window, "CHUNK_TOKENS", 40)
    monkeypatch.setattr(semantic_layer, "SIMILARITY_BYTES", 2000)
    monkeypatch.setattr(semantic_fpn, "BAND_BYTES", 2000)
    monkeypatch.setitem(stripes.STRIPE_BYTES, "cpu", 1000)
    torch.manual_seed(0)
    batch = [
        {"image": torch.rand(3, 41, 35) * 255, "sem_seg": torch.randint(3, (41, 35))}
        for _ in range(2)
    ]
    keys = ("MODEL.SWIN.FREEZE_AT", frozen, "MODEL.FAST_PATHS")
    plain: Any = Trainer.build_model(config(tmp_path, *keys, "none")).double()
    fast: Any = Trainer.build_model(config(tmp_path, *keys, setting)).double()
    for name, parameter in plain.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.7)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fast.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    fast.load_state_dict(plain.state_dict())
    fast = copy.deepcopy(fast)
    results = []
    for model in (plain, fast):
        for part in model.modules():
            part.p = 0.0  # no dropout
        torch.manual_seed(1)  # of stochastic depth
        losses = model.train()(batch)
        sum(losses.values()).backward()
        with torch.inference_mode():
            scores = model.eval()(batch)[0]["sem_seg"]
            with_priors = model.inference(batch, return_priors=True)[1]
        gradients = {name: each.grad for name, each in model.named_parameters()}
        assert sum(each is None for each in gradients.values()) == (
            0 if not frozen else sum(not each.requires_grad for each in model.parameters())
        )
        results.append({**losses, **gradients, "scores": scores, "priors": with_priors})
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9, check_stride=False)


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
