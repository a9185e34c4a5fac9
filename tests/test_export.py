"""Exported files compute what the model computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import tiny_masks
from semask.cli import main
from semask.errors import ConfigError
from semask.inference.export import (
    ExportError,
    ImageToLogits,
    export_program,
    save_onnx,
    save_program,
)
from semask.inference.parity import compare_export
from tiny_model import build_tiny_model, checkpoint, config, photograph, tensor

# Neither a multiple of the patches nor of the windows.
SIZE = (37, 45)
NO_ONNX = "needs the packages onnx, onnxscript and onnxruntime"


def prediction(model: torch.nn.Module, image: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model([{"image": tensor(image)}])[0]["sem_seg"][None]


def difference(model: torch.nn.Module, path: Path) -> float:
    (parity,) = compare_export(model, [(1, *SIZE)], path)
    assert parity.equal_labels > 0.99
    return parity.largest_difference


def test_exported_program_equals_the_model(tmp_path: Path) -> None:
    model = build_tiny_model(config(tmp_path))
    save_program(model, SIZE, tmp_path / "model.pt2")
    program = torch.export.load(str(tmp_path / "model.pt2")).module()
    for seed in range(2):
        image = photograph(*SIZE, seed=seed)
        expected = prediction(model, image)
        logits = program(tensor(image)[None].float())
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert difference(model, tmp_path / "model.pt2") < 1e-5


@pytest.mark.slow
def test_onnx_equals_the_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason=NO_ONNX)
    onnx = pytest.importorskip("onnx", reason=NO_ONNX)
    onnxruntime = pytest.importorskip("onnxruntime", reason=NO_ONNX)
    model = build_tiny_model(config(tmp_path))
    path = tmp_path / "sub" / "model.onnx"
    save_onnx(model, SIZE, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("image", [1, 3, *SIZE], "tensor(float)")
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", [1, 3, *SIZE])]
    for seed in range(2):
        image = photograph(*SIZE, seed=seed)
        expected = prediction(model, image)
        (logits,) = session.run(None, {"image": tensor(image)[None].float().numpy()})
        np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-4)
        assert len(np.unique(logits.argmax(axis=1))) > 1
    assert difference(model, path) < 1e-4


@pytest.mark.parametrize("decoder", tiny_masks.DECODERS)
def test_exported_mask_models_equal_the_model(tmp_path: Path, decoder: str) -> None:
    """Padding and cropping included."""
    model = tiny_masks.build(decoder)
    save_program(model, SIZE, tmp_path / "model.pt2")
    program = torch.export.load(str(tmp_path / "model.pt2")).module()
    image = photograph(*SIZE)
    expected = prediction(model, image)
    scores = program(tensor(image)[None].float())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", tiny_masks.DECODERS)
def test_onnx_of_mask_models_equals_the_model(tmp_path: Path, decoder: str) -> None:
    for package in ("onnxscript", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=NO_ONNX)
    model = tiny_masks.build(decoder)
    save_onnx(model, SIZE, tmp_path / "model.onnx")
    assert difference(model, tmp_path / "model.onnx") < 1e-4


def test_a_model_in_training_stays_in_training(tmp_path: Path) -> None:
    model = build_tiny_model(config(tmp_path)).train()
    modes = [module.training for module in model.modules()]
    program = export_program(model, SIZE)
    assert [module.training for module in model.modules()] == modes
    image = photograph(*SIZE)
    expected = prediction(model.eval(), image)
    logits = program.module()(tensor(image)[None].float())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_the_model_works_on_after_its_export(tmp_path: Path) -> None:
    """The model keeps nothing from tracing."""
    model = build_tiny_model(config(tmp_path))
    export_program(model, SIZE)
    prediction(model, photograph(*SIZE))
    model.train()
    labels = torch.zeros(SIZE, dtype=torch.int64)
    losses = model([{"image": tensor(photograph(*SIZE)), "sem_seg": labels}])
    sum(losses.values()).backward()


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with pytest.raises(ConfigError, match="positive"):
        export_program(build_tiny_model(cfg), (0, 8))
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with pytest.raises(ConfigError, match="'SeMaskSegmentor'"):
        ImageToLogits(build_model(cfg))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install onnx"):
        save_onnx(build_tiny_model(config(tmp_path)), SIZE, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


# ---- the command


@pytest.fixture
def command(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., int]:
    """With a model of the decoder that a test may name."""
    decoder = getattr(request, "param", "fpn")
    weights = checkpoint(tmp_path) if decoder == "fpn" else tiny_masks.checkpoint(tmp_path)

    def run(*arguments: Any) -> int:
        options = ["--config", tmp_path / "config.yaml", "--weights", weights, *arguments]
        return main.run("export", [str(option) for option in options])

    return run


@pytest.mark.parametrize("command", ["fpn", "mask2former"], indirect=True)
def test_command_writes_and_compares(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt2"
    assert command("--output", path, "--size", 24, 40) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Input: image (1, 3, 24, 40), RGB, 0..255"
    assert printed[1] == "Output: logits (1, 3, 24, 40)"
    assert printed[2].startswith("Equal labels: 100.0")
    assert float(printed[3].split()[-1]) < 1e-5
    assert printed[4:] == [f"{path}.parity.json", str(path)]
    parity = json.loads(Path(printed[4]).read_text())
    assert parity["file"] == "model.pt2"
    assert parity["input"]["shape"] == [1, 3, 24, 40]
    assert len(parity["output"]["classes"]) == 3
    (compared,) = parity["compared"]
    assert (compared["batch"], compared["height"], compared["width"]) == (1, 24, 40)
    assert 0 <= compared["largest_difference"] < 1e-5
    assert compared["equal_labels"] > 0.99
    versions = (parity["versions"]["torch"], torch.__version__)
    assert len({version.partition("+")[0] for version in versions}) == 1


def test_command_says_what_is_wrong(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--output", tmp_path / "model.pt") == 2
    assert ".onnx or .pt2" in capsys.readouterr().err
    assert command("--output", tmp_path / "model.pt2", "--size", 0, 3) == 2
    assert "positive" in capsys.readouterr().err
    assert command("--output", tmp_path / "model.pt2", "--opts", "MODEL.NOTHING", 1) == 2
    assert "MODEL.NOTHING" in capsys.readouterr().err
