"""One place chooses the faster forms, one key overrides it, one line in the log says so."""

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from torch import nn

import tiny
from largest import Largest
from semask.config.loading import load_config
from semask.errors import ConfigError
from semask.modeling import SemanticAttention, SeMaskSwin
from semask.modeling.backbone import semantic_layer, swin
from semask.modeling.heads import SemanticFPNHead
from semask.modeling.pixel_decoder import semantic_fpn
from semask.ops import fast_paths as module
from semask.ops import window
from semask.ops.conv3x3 import Conv3x3
from semask.ops.fast_paths import FAST_PATHS, fast_paths
from semask.ops.malloc import can_keep_memory
from semask.solver import build_optimizer


def config(tmp_path: Path, *overrides: Any) -> Any:
    values = [str(value) for value in ("MODEL.DEVICE", "cpu", *overrides)]
    return load_config(tiny.write_config(tmp_path / "config.yaml"), values)


def test_automatic_choice(tmp_path: Path) -> None:
    on_cpu = {"striped_loss", "fused_optimizer", "winograd", "chunked", "folded", "recomputed"}
    kept = {"kept_memory"} if can_keep_memory() else set()
    assert fast_paths(config(tmp_path)) == on_cpu | kept
    mixed = config(tmp_path, "SOLVER.AMP.ENABLED", True)
    assert fast_paths(mixed) == (on_cpu | kept) - {"winograd", "folded"}
    on_gpu = config(tmp_path, "MODEL.DEVICE", "cuda")
    assert fast_paths(on_gpu) == {"striped_loss", "fused_optimizer", "sdpa", "folded"}


def test_key_overrides_the_choice(tmp_path: Path) -> None:
    assert fast_paths(config(tmp_path, "MODEL.FAST_PATHS", "none")) == set()
    some = config(tmp_path, "MODEL.FAST_PATHS", "sdpa, winograd")
    assert fast_paths(some) == {"sdpa", "winograd"}
    with pytest.raises(ConfigError, match=r"MODEL\.FAST_PATHS.*no 'quick'.*striped_loss"):
        fast_paths(config(tmp_path, "MODEL.FAST_PATHS", "sdpa,quick"))


def test_choice_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module._chosen.cache_clear()
    with caplog.at_level(logging.INFO, logger="semask"):
        for _ in range(2):
            build_model(config(tmp_path))
    lines = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert len(lines) == 1
    for name in fast_paths(config(tmp_path)):
        assert f"{name} ({FAST_PATHS[name].does})" in lines[0]


@pytest.mark.parametrize("setting", ["auto", "none"])
def test_the_model_uses_what_was_chosen(tmp_path: Path, setting: str) -> None:
    cfg = config(tmp_path, "MODEL.FAST_PATHS", setting)
    model: Any = build_model(cfg)
    fast = setting == "auto"
    assert model.sem_seg_head.striped_loss == fast
    convolutions = [layer for layer in model.modules() if isinstance(layer, Conv3x3)]
    assert convolutions
    assert all(layer.winograd == fast for layer in convolutions)
    assert bool(build_optimizer(cfg, model).defaults["fused"]) == fast


def test_every_choice_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (window, swin):
        monkeypatch.setattr(file, "CHUNK_TOKENS", 40)
    monkeypatch.setattr(semantic_fpn, "BAND_BYTES", 2000)
    torch.manual_seed(0)
    batch = [
        {"image": torch.rand(3, 40, 36) * 255, "sem_seg": torch.randint(3, (40, 36))}
        for _ in range(2)
    ]
    results = {}
    state: dict[str, Any] = {}
    for setting in ("none", "auto", *FAST_PATHS):
        model: Any = build_model(config(tmp_path, "MODEL.FAST_PATHS", setting))
        model.double()
        state = state or copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        for part in model.modules():
            part.p = part.rate = 0.0  # no dropout, no stochastic depth
        losses = model.train()(batch)
        sum(losses.values()).backward()
        with torch.inference_mode():
            scores = model.eval()(batch)[0]["sem_seg"]
        gradients = [parameter.grad for parameter in model.parameters()]
        results[setting] = [*losses.values(), *gradients, scores]
    for setting, values in results.items():
        for value, expected in zip(values, results["none"], strict=True):
            scale = float(expected.detach().abs().max()) or 1.0
            message = f"{setting}: {{}}".format
            torch.testing.assert_close(
                value, expected, rtol=1e-9, atol=1e-9 * scale, check_stride=False, msg=message
            )


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


@pytest.mark.parametrize("tokens", [1, 33, 100, 200, 1000])  # rows of windows or whole maps
@pytest.mark.parametrize("return_priors", [False, True])
def test_size_of_the_chunks_changes_nothing(
    tokens: int, return_priors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "embed_dim": 8,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "semantic_attention": ("window", "global"),
        "semantic_blocks": (2, 1),
        "semantic_classes": 5,
        "out_features": ("res2", "res3"),
        "activation_checkpoint": (False, False),
    }
    plain = SeMaskSwin(**settings).double().eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.5)
    fast = SeMaskSwin(**settings, chunked=True, folded=True).double().eval()
    fast.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 50, 39, dtype=torch.float64)
    for file in (window, swin):
        monkeypatch.setattr(file, "CHUNK_TOKENS", tokens)
    monkeypatch.setattr(semantic_layer, "SIMILARITY_BYTES", 30_000 if tokens == 33 else 1)
    with torch.inference_mode():
        expected, result = plain(image, return_priors), fast(image, return_priors)
    assert ("prior2" in result) == return_priors
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("height", "width", "shift"), [(9, 5, 2), (8, 8, 0), (13, 4, 1), (1, 9, 2)]
)
@pytest.mark.parametrize("tokens", [1, 40, 100, 1000])
def test_parts_of_the_windows_are_all_of_them(
    height: int, width: int, shift: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "CHUNK_TOKENS", tokens)
    layout = window.window_layout(3, height, width, 4, shift, torch.device("cpu"))
    values = torch.arange(1.0, 3 * height * width + 1)[:, None]
    expected = window.gather_windows(window.append_zero(values), layout)
    parts = list(window.window_parts(layout))
    cut = [window.gather_windows(window.append_zero(part.take(values)), part) for part in parts]
    assert torch.equal(torch.cat(cut), expected)
    back = torch.zeros_like(values)
    for part, windows in zip(parts, cut, strict=True):
        part.put(window.scatter_windows(windows, part), back)
    assert torch.equal(back, values)


@pytest.mark.parametrize(
    ("winograd", "norm"), [(False, "BN"), (True, "BN"), (False, "FrozenBN"), (True, "GN")]
)
@pytest.mark.parametrize("band_bytes", [1, 10_000, 10**6])
@pytest.mark.parametrize(("height", "width"), [(80, 48), (61, 37), (3, 5)])
def test_decoder_in_bands(
    height: int,
    width: int,
    band_bytes: int,
    winograd: bool,
    norm: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(semantic_fpn, "BAND_BYTES", band_bytes)
    torch.manual_seed(0)
    shapes = {f"res{i}": ShapeSpec(channels=i, stride=2**i) for i in range(2, 6)}
    settings: dict[str, Any] = {"input_shape": shapes, "num_classes": 3, "conv_dims": 32}
    plain = SemanticFPNHead(**settings, norm=norm).double().eval()
    fast = SemanticFPNHead(**settings, norm=norm, chunked=True, winograd=winograd).double().eval()
    fast.load_state_dict(plain.state_dict())
    features = {
        name: torch.randn(
            2, shape.channels, -(-height // shape.stride), -(-width // shape.stride)
        ).double()
        for name, shape in shapes.items()
    }
    with torch.inference_mode():
        torch.testing.assert_close(fast(features), plain(features), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("return_prior", [False, True])
def test_parts_of_similarities_follow_mixed_precision(
    return_prior: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = semantic_layer.SemanticLayer(dim=8, num_classes=20, window_size=None, folded=True)
    for block in layer.blocks:
        nn.init.ones_(cast(SemanticAttention, block).gamma)
    x = torch.randn(2, 9, 7, 8)
    results = []
    for limit in (1, 10**9):
        monkeypatch.setattr(semantic_layer, "SIMILARITY_BYTES", limit)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(layer.eval()(x, return_prior)[0])
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)


def test_evaluation_holds_no_hidden_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is made is larger than the features, whatever the layers' own width."""
    for file in (window, swin):
        monkeypatch.setattr(file, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(semantic_layer, "SIMILARITY_BYTES", 1)
    monkeypatch.setattr(semantic_fpn, "BAND_BYTES", 1)
    backbone = SeMaskSwin(
        embed_dim=8,
        num_heads=(1, 2, 4, 8),
        window_size=4,
        semantic_classes=5,
        chunked=True,
        folded=True,
    ).eval()
    head = SemanticFPNHead(
        input_shape=backbone.output_shape(), num_classes=5, conv_dims=24, norm="BN", chunked=True
    ).eval()
    image = torch.randn(1, 3, 256, 256)
    with torch.inference_mode(), Largest() as largest:
        head(backbone(image))
    assert largest.values == 64 * 64 * 8


@pytest.mark.parametrize("chunked", [False, True])
def test_bands_make_no_second_map(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swin, "CHUNK_TOKENS", 8)
    for layer, x in (
        (swin.PatchEmbed(embed_dim=8, chunked=chunked), torch.randn(1, 3, 64, 64)),
        (swin.PatchMerging(8, chunked=chunked), torch.randn(1, 16, 16, 8)),
    ):
        with torch.inference_mode(), Largest() as largest:
            out = layer.eval()(x)
        large = sum(number for size, number in largest.sizes.items() if size >= out.numel())
        assert (large == 1) == chunked  # the result alone
