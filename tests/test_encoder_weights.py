"""Pre-trained weights of timm's networks and of Mix Transformers, as they are published."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from semask.checkpoint import SeMaskCheckpointer
from semask.cli import main
from semask.config import load_config
from semask.engine import Trainer, check_run, train
from semask.errors import CheckpointError
from semask.modeling import SeMaskTimm


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = SeMaskTimm(name=name, semantic_classes=4)


def load(name: str, path: Path) -> Model:
    model = Model(name)
    SeMaskCheckpointer(model).load(str(path))
    return model


def check_equal(model: Model, expected: Mapping[str, Tensor]) -> None:
    found = model.backbone.encoder.network.state_dict()
    assert found
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "test_resnet", "pvt_v2_b0"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_files_of_timm(name: str, ending: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = timm.create_model(name).state_dict()
    path = tmp_path / f"weights{ending}"
    if ending == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    check_equal(load(name, path), state)


def as_nvidia(name: str) -> str:
    """The name in the published Mix Transformers of a parameter of timm's structure."""
    name = name.replace("patch_embed.", "patch_embed1.").replace(".dwconv.", ".dwconv.dwconv.")
    if not name.startswith("stages."):
        return name
    _, stage, rest = name.split(".", 2)
    number = int(stage) + 1
    for part, published in (("downsample", "patch_embed"), ("blocks", "block"), ("norm", "norm")):
        if rest.startswith(part + "."):
            return f"{published}{number}{rest[len(part) :]}"
    raise AssertionError(name)


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names in transformers' files, where keys and values are two matrices."""
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        parts = as_nvidia(name).split(".")
        start, stage = parts[0][:-1], parts[0][-1:]
        if start == "patch_embed":
            rest = ".".join(parts[1:]).replace("norm.", "layer_norm.")
            named[f"segformer.encoder.patch_embeddings.{int(stage) - 1}.{rest}"] = value
        elif start == "norm":
            named[f"segformer.encoder.layer_norm.{int(stage) - 1}.{parts[1]}"] = value
        elif start == "block":
            rest = ".".join(parts[2:])
            for old, new in (
                ("norm1.", "layer_norm_1."),
                ("norm2.", "layer_norm_2."),
                ("attn.norm.", "attention.self.layer_norm."),
                ("attn.sr.", "attention.self.sr."),
                ("attn.q.", "attention.self.query."),
                ("attn.proj.", "attention.output.dense."),
                ("mlp.fc", "mlp.dense"),
            ):
                rest = rest.replace(old, new) if rest.startswith(old) else rest
            block = f"segformer.encoder.block.{int(stage) - 1}.{parts[1]}."
            if rest.startswith("attn.kv."):
                kind = rest.rpartition(".")[2]
                key, val = value.chunk(2)
                named[f"{block}attention.self.key.{kind}"] = key.clone()
                named[f"{block}attention.self.value.{kind}"] = val.clone()
            else:
                named[block + rest] = value
        else:
            named[name.replace("head.", "classifier.")] = value
    return named


@pytest.mark.parametrize("form", ["nvidia", "transformers"])
def test_mix_transformers(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(7)
    state = timm.create_model("mit_b0").state_dict()
    published = (
        {as_nvidia(name): value for name, value in state.items()}
        if form == "nvidia"
        else as_transformers(state)
    )
    torch.save({"state_dict": published}, tmp_path / "weights.pth")
    with caplog.at_level(logging.WARNING):
        check_equal(load("mit_b0", tmp_path / "weights.pth"), state)
    assert "no commercial use" in caplog.text  # the licence of these weights


def changed(state: dict[str, Any], change: str) -> dict[str, Any]:
    name = next(name for name in state if "stages.1" in name)
    if change == "missing":
        return {key: value for key, value in state.items() if key != name}
    if change == "not in the model":
        return {**state, "stages.9.extra": torch.zeros(1)}
    return {**state, name: torch.zeros(3, 1, 1)}


@pytest.mark.parametrize("change", ["missing", "not in the model", "with another shape"])
def test_what_does_not_fit_is_refused(change: str, tmp_path: Path) -> None:
    state = changed(timm.create_model("test_convnext").state_dict(), change)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=change):
        load("test_convnext", tmp_path / "weights.pth")


def small_config(folder: Path, *, network: str = "test_convnext", **sections: Any) -> str:
    """A config file of a small SeMask-FPN with a network of timm, on the dataset of ``tiny``."""
    levels = ["res2", "res3", "res4", "res5"]
    model = {
        "BACKBONE": {"NAME": "SeMaskTimm"},
        "TIMM": {"NAME": network},
        "SEMASK": {"ATTENTION": ["window"] * 4, "NUM_BLOCKS": [1] * 4},
        "SEM_SEG_HEAD": {"IN_FEATURES": levels},
        "DEVICE": "cpu",
        "EXPECTS_WEIGHTS": True,
    }
    output = str(folder / "out")
    return tiny.write_config(folder / "config.yaml", MODEL=model, OUTPUT_DIR=output, **sections)


@pytest.mark.parametrize("converted", [False, True])
def test_a_training_starts_from_a_file_of_timm(
    converted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file as it is, or as ``semask convert`` writes it."""
    torch.manual_seed(7)
    state = timm.create_model("test_convnext").state_dict()
    path = tmp_path / "published.safetensors"
    save_file(state, path)
    config = small_config(tmp_path)
    if converted:
        target = tmp_path / "converted.pth"
        assert main.run("convert", [str(path), str(target), "--config", config]) == 0
        assert main.run("convert", [str(path), str(tmp_path / "b.pth")]) == 2  # no --config
        path = target
    with tiny.datasets(tmp_path), tiny.own_loggers():
        cfg = load_config(config, ["MODEL.WEIGHTS", str(path), "SOLVER.BASE_LR", "1e-12"])
        check_run(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        assert "random weights" not in caplog.text
        trainer.train()
    trained = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    for name, value in state.items():
        if not name.startswith("head."):
            torch.testing.assert_close(trained[f"backbone.encoder.network.{name}"], value)


@pytest.mark.parametrize("pretrained", [False, True])
def test_pretrained_weights_are_what_a_recipe_expects(
    pretrained: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    create = timm.create_model

    def with_file(name: str, **options: Any) -> Any:
        if options.get("pretrained"):
            overlay = {"file": str(tmp_path / "weights.safetensors"), "license": "cc-by-nc-4.0"}
            options["pretrained_cfg_overlay"] = overlay
        return create(name, **options)

    save_file(create("test_convnext").state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setattr(timm, "create_model", with_file)
    with tiny.datasets(tmp_path), tiny.own_loggers():
        cfg = load_config(small_config(tmp_path), ["MODEL.TIMM.PRETRAINED", str(pretrained)])
        Trainer(cfg).resume_or_load(resume=False)
    assert ("MODEL.TIMM.PRETRAINED" in caplog.text) != pretrained  # in the warning
    assert ("cc-by-nc-4.0" in caplog.text) == pretrained


def test_a_resumed_run_fetches_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the checkpoint; without one, --resume starts from timm's."""
    asked: list[str] = []
    create = timm.create_model

    def counted(name: str, **options: Any) -> Any:
        if options.pop("pretrained", False):
            asked.append(name)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", counted)
    opts = ["MODEL.TIMM.PRETRAINED=True", "SOLVER.MAX_ITER=1", "TEST.EVAL_PERIOD=0"]
    with tiny.datasets(tmp_path), tiny.own_loggers():
        config = small_config(tmp_path)
        assert main.run("train", [config, "--resume", *opts]) == 0
        assert asked == ["test_convnext"]
        assert main.run("train", [config, "--resume", *opts, "SOLVER.MAX_ITER=2"]) == 0
        assert main.run("evaluate", [config, "--resume", *opts]) == 0
        train(load_config(config, [*opts, "SOLVER.MAX_ITER=3"]), resume=True)
        assert asked == ["test_convnext"]
        trainer = Trainer(load_config(config, opts), resume=True)
        with pytest.raises(ValueError, match="resume"):
            trainer.resume_or_load(resume=False)


def test_another_network_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError):
        load("test_convnext", tmp_path / "weights.pth")
