"""Loading from every layout, atomic saving."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from semask.checkpoint import SeMaskCheckpointer
from semask.errors import CheckpointError
from toy_model import Toy, imagenet, same, saved, values

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


def test_unused_training_states_are_warned_of_where_a_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model alone, as in a predictor, has no use for them, and says nothing."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
    states: dict[str, Any] = {"optimizer": optimizer, "ema": nn.Linear(2, 2)}
    SeMaskCheckpointer(model, str(tmp_path), **states).save("model")
    path = str(tmp_path / "model.pth")
    SeMaskCheckpointer(model).load(path)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    SeMaskCheckpointer(model, optimizer=optimizer).load(path)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "'ema'" in warning
    assert path in warning


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
    loaded = ("backbone.encoder.stem.patch_embed.", "backbone.encoder.stages.0.blocks.")
    for name, value in values(model).items():
        assert torch.equal(value, wanted[name] if name.startswith(loaded) else before[name])


def test_imagenet_swin_of_another_window_is_resized(tmp_path: Path) -> None:
    source, model = Toy(window=2, semantic=False), Toy(window=3)
    name = "backbone.encoder.stages.0.blocks.0.attn.relative_position_bias_table"
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
    before = set(torch.serialization.get_safe_globals())
    test_numpy_numbers_beside_the_weights_are_harmless(tmp_path)
    assert set(torch.serialization.get_safe_globals()) == before


def test_meta_model_is_enough_to_check(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {"model": values(Toy())})
    with torch.device("meta"):
        model, other = Toy(), Toy(classes=5)
    SeMaskCheckpointer(model).check(str(path))
    with pytest.raises(CheckpointError, match="NUM_CLASSES"):
        SeMaskCheckpointer(other).check(str(path))


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


def test_a_former_run_gives_its_weights_but_cannot_go_on(tmp_path: Path) -> None:
    source, model = Toy(), Toy()
    former = {
        name.replace("semantic_layers.res2", "stages.0.semantic_layer")
        .replace("encoder.stem.", "")
        .replace("encoder.", ""): value
        for name, value in values(source).items()
    }
    assert "backbone.stages.0.semantic_layer.query.weight" in former
    path = saved(tmp_path / "m.pth", {"model": former, "trainer": {"iteration": 3}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = values(model)
    with pytest.raises(CheckpointError, match=r"m\.pth.*without --resume"):
        SeMaskCheckpointer(model, trainer=optimizer).load(str(path))
    assert same(before, values(model))
    SeMaskCheckpointer(model, trainer=optimizer).load(str(path), checkpointables=[])
    assert same(values(source), values(model))
