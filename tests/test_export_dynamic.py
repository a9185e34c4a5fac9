"""Dynamic exports equal the model for batches and sizes other than the traced ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import test_encoder_heads
import tiny_masks
from semask.cli import main
from semask.inference.export import ExportError, export_program, save_onnx, save_program
from semask.inference.parity import compare_export
from semask.modeling.backbone.padded import PaddedSequence
from tiny_model import build_tiny_model, checkpoint, config

LARGE = (480, 640)


def sizes(least: int) -> list[tuple[int, int, int]]:
    """Batch, height, width: small and large, multiples of 32 and of nothing."""
    return [
        (1, least, least + 12),
        (3, least + 17, 2 * least + 43),
        (2, 2 * least + 30, least + 63),
        (1, 96 + least // 32 * 32, 224),
    ]


Build = Callable[[Path], nn.Module]


def _masks(decoder: str) -> Build:
    # With a block of shifted windows; windows of two tokens fit into small images.
    return lambda folder: tiny_masks.build(decoder, SWIN__DEPTHS=[2, 1, 1, 1], SWIN__WINDOW_SIZE=2)


def _swin(folder: Path) -> nn.Module:
    """With a block of shifted windows."""
    cfg = config(folder)
    cfg.MODEL.SWIN.DEPTHS = [2, 1]
    return build_tiny_model(cfg)


def _encoder(network: str) -> Build:
    make = test_encoder_heads.build
    return lambda folder: make(test_encoder_heads.config(network)).eval()


# Each model is exported once, as its trace takes many seconds: an ONNX file is made from the same
# program. `test_command` writes a program of SeMask-FPN.
PROGRAMS: dict[str, Build] = {
    "swin maskformer": _masks("maskformer"),
    **{f"{name} fpn": _encoder(name) for name in ("mit_b0", "test_mambaout")},
}
ONNX: dict[str, Build] = {"swin fpn": _swin, "swin mask2former": _masks("mask2former")}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_for_any_size(kind: str, tmp_path: Path) -> None:
    model = PROGRAMS[kind](tmp_path)
    least = save_program(model, LARGE, tmp_path / "model.pt2", dynamic=True)
    assert least <= 129
    for parity in compare_export(model, sizes(least), tmp_path / "model.pt2"):
        assert parity.largest_difference < 1e-4, parity
        assert parity.equal_labels > 0.999, parity


@pytest.mark.parametrize("kind", ONNX)
def test_onnx_for_any_size(kind: str, tmp_path: Path) -> None:
    for package in ("onnxscript", "onnx"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = ONNX[kind](tmp_path), tmp_path / "model.onnx"
    least = save_onnx(model, LARGE, path, dynamic=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    (output,) = session.get_outputs()
    assert (output.shape[0], *output.shape[2:]) == ("batch", "height", "width")
    for parity in compare_export(model, sizes(least), path):
        assert parity.largest_difference < 1e-3, parity
        assert parity.equal_labels > 0.999, parity


def test_a_model_that_asks_for_the_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PaddedSequence.forward

    def asking(self: PaddedSequence, x: Tensor) -> Tensor:
        return forward(self, x if x.shape[-1] % 3 == 0 else 2 * x)

    monkeypatch.setattr(PaddedSequence, "forward", asking)
    monkeypatch.setattr("semask.inference.export.LEAST_OPEN_SIDES", (33, 65))
    with pytest.raises(ExportError, match=r"SeMaskTimm.*without --dynamic"):
        export_program(PROGRAMS["test_mambaout fpn"](tmp_path), LARGE, dynamic=True)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt2"
    words: list[Any] = ["--config", tmp_path / "config.yaml", "--weights", checkpoint(tmp_path)]
    words += ["--output", path, "--dynamic", "--size", 48, 80]
    assert main.run("export", [str(word) for word in words]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Input: image (batch, 3, height, width), RGB, 0..255, sides of ")
    assert printed[1] == "Output: logits (batch, 3, height, width)"
    parity = json.loads((tmp_path / "model.pt2.parity.json").read_text())
    assert parity["input"]["shape"] == ["batch", 3, "height", "width"]
    assert parity["input"]["least_side"] == 33
    found = {(each["batch"], each["height"], each["width"]) for each in parity["compared"]}
    assert (1, 48, 80) in found
    assert len(found) > 2
    assert any(batch > 1 for batch, _, _ in found)
    assert all(each["largest_difference"] < 1e-4 for each in parity["compared"])
    program = torch.export.load(str(path)).module()
    with pytest.raises((RuntimeError, AssertionError)):
        program(torch.zeros(1, 3, 20, 80))
