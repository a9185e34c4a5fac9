"""Strict and safe loading, atomic saving."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from semask.checkpoint import CheckpointError, SeMaskCheckpointer

STAGES = 2


class Toy(nn.Module):
    """The names of a small model: a backbone's, with or without semantic layers, and a head's."""

    def __init__(self, classes: int = 3, dim: int = 4, window: int = 2, semantic: bool = True):
        super().__init__()
        rows = (2 * window - 1) ** 2
        stage = nn.ModuleDict(
            {"blocks": nn.ModuleList([nn.ModuleDict({"attn": BiasTable(rows, dim)})])}
        )
        if semantic:
            stage["semantic_layer"] = nn.ModuleDict({"query": nn.Linear(dim, classes)})
        self.backbone = nn.ModuleDict(
            {
                "patch_embed": nn.ModuleDict({"proj": nn.Linear(3, dim)}),
                "stages": nn.ModuleList([stage]),
                "output_norms": nn.ModuleDict({"res2": nn.LayerNorm(dim)}),
            }
        )
        self.sem_seg_head = nn.ModuleDict({"predictor": nn.Linear(dim, classes)})


class BiasTable(nn.Module):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.randn(rows, 1))
        self.qkv = nn.Linear(dim, 3 * dim)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def imagenet(model: Toy) -> dict[str, Tensor]:
    """The backbone's values by the names of an ImageNet Swin checkpoint."""
    state = values(model)
    table = "blocks.0.attn.relative_position_bias_table"
    return {
        "patch_embed.proj.weight": state["backbone.patch_embed.proj.weight"],
        "patch_embed.proj.bias": state["backbone.patch_embed.proj.bias"],
        "layers.0.blocks.0.attn.qkv.weight": state["backbone.stages.0.blocks.0.attn.qkv.weight"],
        "layers.0.blocks.0.attn.qkv.bias": state["backbone.stages.0.blocks.0.attn.qkv.bias"],
        f"layers.0.{table}": state[f"backbone.stages.0.{table}"],
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4),
        "layers.0.blocks.1.attn_mask": torch.zeros(1, 4, 4),
        "norm.weight": torch.ones(4),
        "norm.bias": torch.zeros(4),
        "head.weight": torch.zeros(1000, 4),
        "head.bias": torch.zeros(1000),
    }


def refusal(model: nn.Module, path: Path, **options: Any) -> str:
    """The message with which ``path`` is refused; the model must not have changed."""
    before = values(model)
    checkpointer = SeMaskCheckpointer(model, **options)
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load(str(path))
    with pytest.raises(CheckpointError):
        checkpointer.check(str(path))
    assert same(before, values(model))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# ---- loading ----


def test_own_checkpoint_comes_back_with_everything(tmp_path: Path) -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()
    optimizer.step()
    SeMaskCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model", iteration=7)

    other = Toy()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    checkpointer = SeMaskCheckpointer(other, str(tmp_path), optimizer=other_optimizer)
    assert checkpointer.has_checkpoint()
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 7}
    assert same(values(model), values(other))
    assert other_optimizer.param_groups[0]["lr"] == 0.5
    moments = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])


def test_weights_alone_do_not_touch_the_optimizer(tmp_path: Path) -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    SeMaskCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model")
    optimizer.param_groups[0]["lr"] = 0.25
    checkpointer = SeMaskCheckpointer(model, str(tmp_path / "other"), optimizer=optimizer)
    checkpointer.resume_or_load(str(tmp_path / "model.pth"), resume=True)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_no_path_loads_nothing() -> None:
    model = Toy()
    before = values(model)
    assert SeMaskCheckpointer(model).load("") == {}
    SeMaskCheckpointer(model).check("")
    assert same(before, values(model))


@pytest.mark.parametrize("layout", ["model", "state_dict", "bare", "safetensors", "module prefix"])
def test_layouts(tmp_path: Path, layout: str) -> None:
    source, model = Toy(), Toy()
    state = values(source)
    path = tmp_path / "weights.pth"
    if layout == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif layout == "bare":
        saved(path, state)
    elif layout == "module prefix":
        saved(path, {"model": {f"module.{k}": v for k, v in state.items()}})
    else:
        saved(path, {layout: state, "epoch": 3})
    SeMaskCheckpointer(model).check(str(path))
    assert not same(state, values(model))
    SeMaskCheckpointer(model).load(str(path))
    assert same(state, values(model))


def test_imagenet_swin_fills_the_backbone_and_leaves_the_rest(tmp_path: Path) -> None:
    source, model = Toy(semantic=False), Toy()
    path = saved(tmp_path / "swin.pth", {"model": imagenet(source)})
    before, wanted = values(model), values(source)
    SeMaskCheckpointer(model).load(str(path))
    loaded = ("backbone.patch_embed.", "backbone.stages.0.blocks.")
    for name, value in values(model).items():
        assert torch.equal(value, wanted[name] if name.startswith(loaded) else before[name])


def test_imagenet_swin_of_another_window_is_resized(tmp_path: Path) -> None:
    source, model = Toy(window=2, semantic=False), Toy(window=3)
    name = "backbone.stages.0.blocks.0.attn.relative_position_bias_table"
    nn.init.constant_(source.get_parameter(name), 0.5)
    SeMaskCheckpointer(model).load(str(saved(tmp_path / "s.pth", {"model": imagenet(source)})))
    assert model.get_parameter(name).shape == (25, 1)
    assert torch.allclose(model.get_parameter(name), torch.tensor(0.5))


def test_numpy_numbers_beside_the_weights_are_harmless(tmp_path: Path) -> None:
    model, source = Toy(), Toy()
    content = {"state_dict": values(source), "meta": {"best_score": np.float64(0.5), "iter": 3}}
    SeMaskCheckpointer(model).load(str(saved(tmp_path / "m.pth", content)))
    assert same(values(source), values(model))


def test_numpy_numbers_in_torch_2_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no list of what is allowed for a single reading, but one for all of them."""
    monkeypatch.delattr(torch.serialization, "safe_globals", raising=False)
    before = torch.serialization.get_safe_globals()
    test_numpy_numbers_beside_the_weights_are_harmless(tmp_path)
    assert torch.serialization.get_safe_globals() == before


def test_meta_model_is_enough_to_check(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {"model": values(Toy())})
    with torch.device("meta"):
        model, other = Toy(), Toy(classes=5)
    SeMaskCheckpointer(model).check(str(path))
    with pytest.raises(CheckpointError, match="NUM_CLASSES"):
        SeMaskCheckpointer(other).check(str(path))


# ---- refusals ----


def test_class_count(tmp_path: Path) -> None:
    message = refusal(Toy(classes=5), saved(tmp_path / "m.pth", {"model": values(Toy(classes=3))}))
    assert "4 of another shape" in message
    assert "sem_seg_head.predictor.weight (3, 4) -> (5, 4)" in message
    assert "set MODEL.SEM_SEG_HEAD.NUM_CLASSES to 3" in message


def test_another_architecture_is_listed_in_full(tmp_path: Path) -> None:
    state = values(Toy(dim=8))
    state["backbone.stages.0.extra"] = torch.zeros(1)
    del state["backbone.patch_embed.proj.bias"]
    message = refusal(Toy(dim=4), saved(tmp_path / "m.pth", {"model": state}))
    assert "1 missing from the checkpoint: backbone.patch_embed.proj.bias." in message
    assert "1 left over in the checkpoint: backbone.stages.0.extra." in message
    assert "backbone.patch_embed.proj.weight (8, 3) -> (4, 3)" in message


def test_long_lists_are_cut_short(tmp_path: Path) -> None:
    state = values(Toy()) | {f"backbone.stages.9.x{i}": torch.zeros(1) for i in range(30)}
    message = refusal(Toy(), saved(tmp_path / "m.pth", {"model": state}))
    assert "30 left over in the checkpoint" in message
    assert "... and 22 more" in message
    assert len(message) < 1000


@pytest.mark.parametrize("in_model", [True, False])
def test_semantic_layers_only_on_one_side(tmp_path: Path, in_model: bool) -> None:
    path = saved(tmp_path / "m.pth", {"model": values(Toy(semantic=not in_model))})
    message = refusal(Toy(semantic=in_model), path)
    assert f"The {'checkpoint' if in_model else 'model'} lacks the semantic layers" in message
    assert "MODEL.SEMASK.ATTENTION" in message


def test_imagenet_swin_has_to_be_complete(tmp_path: Path) -> None:
    state = imagenet(Toy(semantic=False))
    del state["layers.0.blocks.0.attn.qkv.bias"]
    state["layers.0.blocks.7.attn.qkv.weight"] = torch.zeros(1)
    message = refusal(Toy(), saved(tmp_path / "swin.pth", {"model": state}))
    assert "ImageNet-pretrained Swin" in message
    assert "1 missing from the checkpoint: backbone.stages.0.blocks.0.attn.qkv.bias." in message
    assert "1 left over in the checkpoint: backbone.stages.0.blocks.7.attn.qkv.weight." in message


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(Toy(), tmp_path / "nowhere.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"m{suffix}"
    if suffix == ".pth":
        torch.save({"model": values(Toy())}, path)
    else:
        save_file(values(Toy()), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "damaged or incomplete" in refusal(Toy(), path)


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [1, 2], {"model": 3}])
def test_file_without_weights(tmp_path: Path, content: Any) -> None:
    assert "has no weights" in refusal(Toy(), saved(tmp_path / "m.pth", content))


TABLE = "blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"layers.0.{TABLE}", torch.zeros(25, 1, dtype=torch.int64), "another shape"),
        (f"layers.0.{TABLE}", torch.zeros(9, 1, dtype=torch.int64), "without fractions"),
        (f"layers.0.{TABLE}", torch.zeros(25), "another shape"),
        (f"layers.0.{TABLE}", torch.zeros(()), "another shape"),
        (f"layers.0.{TABLE}", torch.zeros(0, 1), "another shape"),
        (f"layers.0.{TABLE}", torch.zeros(24, 1), "another shape"),
        ("absolute_pos_embed", torch.zeros(1, 17, 4), "another shape"),  # with a class token
        ("absolute_pos_embed", torch.zeros(16, 4), "another shape"),
        ("absolute_pos_embed", torch.zeros(1, 16, 5), "another shape"),
        ("absolute_pos_embed", torch.zeros(1, 4, 0, 0), "another shape"),
        ("absolute_pos_embed", torch.zeros(1, 4, 4, 4, dtype=torch.int32), "another shape"),
    ],
)
def test_tables_that_cannot_be_resized(
    tmp_path: Path, name: str, value: Tensor, words: str
) -> None:
    model = Toy()
    model.backbone.register_parameter("absolute_pos_embed", nn.Parameter(torch.zeros(1, 4, 6, 6)))
    state = {**imagenet(Toy(semantic=False)), "absolute_pos_embed": torch.zeros(1, 16, 4)}
    SeMaskCheckpointer(model).check(str(saved(tmp_path / "good.pth", {"model": state})))
    message = refusal(model, saved(tmp_path / "m.pth", {"model": {**state, name: value}}))
    assert words in message
    assert f"backbone.{name.replace('layers', 'stages')} (" in message


def test_a_table_in_half_precision_is_resized(tmp_path: Path) -> None:
    model, name = Toy(window=3), f"layers.0.{TABLE}"
    state = imagenet(Toy(window=2, semantic=False))
    state[name] = torch.full((9, 1), 0.5, dtype=torch.float16)
    SeMaskCheckpointer(model).load(str(saved(tmp_path / "m.pth", {"model": state})))
    loaded = model.get_parameter(f"backbone.stages.0.{TABLE}")
    assert torch.allclose(loaded, torch.full((25, 1), 0.5))


@pytest.mark.parametrize("layout", ["model", "state_dict", "bare"])
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({7: torch.zeros(1)}, "has a parameter under 7, a int in place of its name"),
        ({"list": [1.0]}, "has a list under 'list', where a parameter should be a tensor"),
        ({"none": None}, "has a NoneType under 'none'"),
    ],
)
def test_entries_that_are_no_parameters(
    tmp_path: Path, layout: str, entry: dict[Any, Any], words: str
) -> None:
    state = {**values(Toy()), **entry}
    path = saved(tmp_path / "m.pth", state if layout == "bare" else {layout: state})
    if layout == "bare" and 7 not in entry:  # then it stands beside the weights
        SeMaskCheckpointer(Toy()).load(str(path))
    else:
        assert words in refusal(Toy(), path)


def test_two_names_for_one_parameter(tmp_path: Path) -> None:
    state = imagenet(Toy(semantic=False))
    state["stages.0.blocks.0.attn.qkv.bias"] = torch.zeros(12)
    message = refusal(Toy(), saved(tmp_path / "m.pth", {"model": state}))
    assert "Two of its parameters stand for 'backbone.stages.0.blocks.0.attn.qkv.bias'" in message


def test_a_start_is_no_complete_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "swin.pth", {"model": imagenet(Toy(semantic=False))})
    message = refusal(Toy(), path, complete=True)
    assert "is no complete model: it has no values for" in message
    assert "give MODEL.WEIGHTS a checkpoint that a training" in message
    whole = saved(tmp_path / "whole.pth", {"model": values(Toy())})
    SeMaskCheckpointer(Toy(), complete=True).load(str(whole))


def test_unrelated_names(tmp_path: Path) -> None:
    message = refusal(Toy(), saved(tmp_path / "m.pth", {"model": {"fc.weight": torch.zeros(1)}}))
    assert "fc.weight" in message


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".bin"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_malicious_pickle_is_not_run(tmp_path: Path, suffix: str, as_zip: bool) -> None:
    target = tmp_path / "executed"
    path = tmp_path / f"evil{suffix}"
    content = {"model": values(Toy()), "extra": Malicious(target)}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    message = refusal(Toy(), path)
    assert not target.exists()
    assert "could run code" in message or "can run any code" in message


def test_pickle_only_with_the_flag(tmp_path: Path) -> None:
    source, model = Toy(), Toy()
    path = tmp_path / "zoo.pkl"
    arrays = {name: value.numpy() for name, value in values(source).items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    assert "allow_pickle=True" in refusal(model, path)
    SeMaskCheckpointer(model, allow_pickle=True).load(str(path))
    assert same(values(source), values(model))


def test_state_of_another_optimizer(tmp_path: Path) -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters())
    SeMaskCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model")
    other = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    with pytest.raises(CheckpointError, match="'optimizer' state is of another model or optimizer"):
        SeMaskCheckpointer(model, str(tmp_path), optimizer=other).load(str(tmp_path / "model.pth"))


# ---- saving ----


class Unsavable:
    def state_dict(self) -> dict[str, Any]:
        return {"values": self}

    def __reduce__(self) -> Any:
        raise OSError("No space left on device")


def test_failed_save_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Toy()
    SeMaskCheckpointer(model, str(tmp_path)).save("model_0")
    before = values(model)
    nn.init.zeros_(model.get_parameter("sem_seg_head.predictor.weight"))
    files = sorted(os.listdir(tmp_path))
    former = (tmp_path / "model_0.pth").read_bytes()

    # In the middle of the file, and with all bytes written but not yet in its place.
    with pytest.raises(CheckpointError, match="No space left"):
        SeMaskCheckpointer(model, str(tmp_path), late=Unsavable()).save("model_1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        for name in ("model_0", "model_1"):
            with pytest.raises(CheckpointError, match="No space left"):
                SeMaskCheckpointer(model, str(tmp_path)).save(name)

    assert sorted(os.listdir(tmp_path)) == files
    assert (tmp_path / "model_0.pth").read_bytes() == former
    checkpointer = SeMaskCheckpointer(model, str(tmp_path))
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0.pth")
    checkpointer.resume_or_load("", resume=True)
    assert same(before, values(model))


def no_space(_descriptor: int) -> None:
    raise OSError("No space left on device")


def test_last_checkpoint_follows_the_complete_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = SeMaskCheckpointer(Toy(), str(tmp_path))
    checkpointer.save("first")
    renamed: list[str] = []
    replace = os.replace

    def record(source: str, target: str) -> None:
        renamed.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    checkpointer.save("second")
    assert renamed == ["second.pth", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "second.pth"
    assert sorted(os.listdir(tmp_path)) == ["first.pth", "last_checkpoint", "second.pth"]


def test_other_processes_do_not_write(tmp_path: Path) -> None:
    SeMaskCheckpointer(Toy(), str(tmp_path), save_to_disk=False).save("model")
    assert list(tmp_path.iterdir()) == []
