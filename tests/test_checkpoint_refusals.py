"""Checkpoints that are refused, and their messages; the model is unchanged."""

import pickle
from collections import Counter, OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from semask.checkpoint import SeMaskCheckpointer
from semask.errors import CheckpointError, DamagedCheckpointError
from toy_model import Toy, imagenet, same, saved, values


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


def test_class_count(tmp_path: Path) -> None:
    message = refusal(Toy(classes=5), saved(tmp_path / "m.pth", {"model": values(Toy(classes=3))}))
    assert "4 with another shape" in message
    assert "sem_seg_head.predictor.weight (3, 4) -> (5, 4)" in message
    assert "set MODEL.SEM_SEG_HEAD.NUM_CLASSES to 3" in message


def test_another_architecture_is_listed_in_full(tmp_path: Path) -> None:
    state = values(Toy(dim=8))
    state["backbone.encoder.stages.0.extra"] = torch.zeros(1)
    del state["backbone.encoder.stem.patch_embed.proj.bias"]
    message = refusal(Toy(dim=4), saved(tmp_path / "m.pth", {"model": state}))
    assert "1 missing from the checkpoint: backbone.encoder.stem.patch_embed.proj.bias." in message
    assert "1 not in the model: backbone.encoder.stages.0.extra." in message
    assert "backbone.encoder.stem.patch_embed.proj.weight (8, 3) -> (4, 3)" in message


def test_long_lists_are_cut_short(tmp_path: Path) -> None:
    state = values(Toy()) | {f"backbone.encoder.stages.9.x{i}": torch.zeros(1) for i in range(30)}
    message = refusal(Toy(), saved(tmp_path / "m.pth", {"model": state}))
    assert "30 not in the model" in message
    assert " and 22 more" in message
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
    assert (
        "1 missing from the checkpoint: backbone.encoder.stages.0.blocks.0.attn.qkv.bias."
        in message
    )
    assert "1 not in the model: backbone.encoder.stages.0.blocks.7.attn.qkv.weight." in message


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


def test_one_flipped_bit(tmp_path: Path) -> None:
    """Anywhere in the file: it is noticed, or the weights are as they were."""
    source = Toy()
    path = saved(tmp_path / "m.pth", {"model": values(source), "iteration": 3})
    whole = path.read_bytes()
    refused = 0
    for place in range(7, len(whole), len(whole) // 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        model = Toy()
        try:
            rest = SeMaskCheckpointer(model).load(str(path))
        except DamagedCheckpointError:
            refused += 1
        else:  # between two entries, or in a date
            assert same(values(source), values(model))
            assert rest == {"iteration": 3}
    assert refused > 10


def test_a_flipped_bit_of_a_weight_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {"model": {"a": torch.zeros(1000)}})
    content = bytearray(path.read_bytes())
    content[content.index(bytes(3000)) + 100] = 1
    path.write_bytes(content)
    assert "checksum of its part 'm/data/0' is wrong" in refusal(Toy(), path)


@pytest.mark.skipif(
    not hasattr(torch.serialization, "set_crc32_options"), reason="this PyTorch always writes them"
)
def test_an_archive_without_checksums(tmp_path: Path) -> None:
    source, model = Toy(), Toy()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "m.pth", {"model": values(source)})
    finally:
        torch.serialization.set_crc32_options(True)
    SeMaskCheckpointer(model).load(str(path))
    assert same(values(source), values(model))


def test_what_a_file_may_hold_is_the_same_after_a_reading(tmp_path: Path) -> None:
    before = Counter(torch.serialization.get_safe_globals())  # of a set, whose order is chance
    path = saved(tmp_path / "m.pth", {"model": values(Toy()), "score": np.float64(0.5)})
    SeMaskCheckpointer(Toy()).load(str(path))
    assert Counter(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_any_few_bytes_are_no_checkpoint(tmp_path: Path, suffix: str) -> None:
    """Whatever the first byte tells a decoder to do."""
    path = tmp_path / f"junk{suffix}"
    for first in range(256):
        path.write_bytes(bytes([first]) + b"unk")
        assert path.name in refusal(Toy(), path)


@pytest.mark.parametrize("content", ["picture", "page", "zeros"])
def test_files_of_another_kind(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cat.png"
    if content == "picture":
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_bytes({"page": b"<!DOCTYPE html>", "zeros": bytes(5000)}[content])
    message = refusal(Toy(), path)
    assert "is not a checkpoint, or its header is damaged" in message
    assert "documentation" not in message
    assert "weights_only" not in message


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [1, 2], {"model": 3}])
def test_file_without_weights(tmp_path: Path, content: Any) -> None:
    assert "has no weights" in refusal(Toy(), saved(tmp_path / "m.pth", content))


TABLE = "blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"layers.0.{TABLE}", torch.zeros(25, 1, dtype=torch.int64), "another shape"),
        (f"layers.0.{TABLE}", torch.zeros(9, 1, dtype=torch.int64), "not floating-point"),
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
    stem = model.get_submodule("backbone.encoder.stem")
    stem.register_parameter("absolute_pos_embed", nn.Parameter(torch.zeros(1, 4, 6, 6)))
    state = {**imagenet(Toy(semantic=False)), "absolute_pos_embed": torch.zeros(1, 16, 4)}
    SeMaskCheckpointer(model).check(str(saved(tmp_path / "good.pth", {"model": state})))
    message = refusal(model, saved(tmp_path / "m.pth", {"model": {**state, name: value}}))
    assert words in message
    own = name.replace("layers", "stages") if "layers" in name else f"stem.{name}"
    assert f"backbone.encoder.{own} (" in message


def test_a_table_in_half_precision_is_resized(tmp_path: Path) -> None:
    model, name = Toy(window=3), f"layers.0.{TABLE}"
    state = imagenet(Toy(window=2, semantic=False))
    state[name] = torch.full((9, 1), 0.5, dtype=torch.float16)
    SeMaskCheckpointer(model).load(str(saved(tmp_path / "m.pth", {"model": state})))
    loaded = model.get_parameter(f"backbone.encoder.stages.0.{TABLE}")
    assert torch.allclose(loaded, torch.full((25, 1), 0.5))


@pytest.mark.parametrize("layout", ["model", "state_dict", "bare"])
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({7: torch.zeros(1)}, "has the key 7, a int instead of a parameter name"),
        ({"list": [1.0]}, "has a list under 'list' instead of a tensor"),
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
    assert "Two of its parameters map to" in message
    assert "'backbone.encoder.stages.0.blocks.0.attn.qkv.bias'" in message


def test_a_start_is_no_complete_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "swin.pth", {"model": imagenet(Toy(semantic=False))})
    message = refusal(Toy(), path, complete=True)
    assert "is not a complete model: it lacks" in message
    assert "set MODEL.WEIGHTS to a checkpoint written by a training" in message
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
    if suffix == ".pkl" and not as_zip:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    message = refusal(Toy(), path)
    assert not target.exists()
    assert "documentation" not in message
    assert "weights_only" not in message
    assert "open" in message or (suffix == ".pkl" and "torch" in message)
    assert "could run code" in message or "can run arbitrary code" in message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_arrays_needs_no_flag(tmp_path: Path, protocol: int) -> None:
    source, model = Toy(), Toy()
    arrays = OrderedDict((name, value.numpy()) for name, value in values(source).items())
    content = {"model": arrays, "__author__": "somebody", "score": np.float64(0.5)}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    rest = SeMaskCheckpointer(model).load(str(path))
    assert same(values(source), values(model))
    assert rest == {"__author__": "somebody", "score": 0.5}


def test_a_pickle_of_more_than_arrays_only_with_the_flag(tmp_path: Path) -> None:
    source, model = Toy(), Toy()
    arrays = {name: value.numpy() for name, value in values(source).items()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "made": PurePosixPath("x")}))
    message = refusal(model, path)
    assert "pathlib" in message
    assert "allow_pickle=True" in message
    SeMaskCheckpointer(model, allow_pickle=True).load(str(path))
    assert same(values(source), values(model))


@pytest.mark.parametrize(
    "value",
    [np.array(["text"]), np.array([{}], dtype=object), [1.0], None],
    ids=["text", "objects", "list", "None"],
)
def test_a_pickle_whose_parameters_are_none(tmp_path: Path, value: Any) -> None:
    arrays = {name: value.numpy() for name, value in values(Toy()).items()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": {**arrays, "odd": value}}))
    refusal(Toy(), path)


def test_state_of_another_optimizer(tmp_path: Path) -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters())
    SeMaskCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model")
    other = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    with pytest.raises(CheckpointError, match="'optimizer'"):
        SeMaskCheckpointer(model, str(tmp_path), optimizer=other).load(str(tmp_path / "model.pth"))
