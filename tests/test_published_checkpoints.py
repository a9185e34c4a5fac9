"""Published checkpoints, by their names and shapes alone, fit this project's models exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import CASES, Model, load_meta
from semask.checkpoint import SeMaskCheckpointer
from semask.errors import CheckpointError


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def published(case: str) -> dict[str, Tensor]:
    """Placeholders for all parameters of a published model, by the published names."""
    shapes = dict(load_meta(case)["state_dict"])
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("case", CASES)
def test_published_checkpoints_are_complete(tmp_path: Path, case: str) -> None:
    with torch.device("meta"):
        checkpointer = SeMaskCheckpointer(Model(case))
    state = published(case)
    path = str(saved(tmp_path / "published.pth", {"state_dict": state, "meta": {"iter": 1}}))
    checkpointer.check(path)

    last = "backbone.layers.3.blocks.1.mlp.fc2.bias"
    saved(tmp_path / "published.pth", {"state_dict": {k: v for k, v in state.items() if k != last}})
    with pytest.raises(CheckpointError, match=r"1 missing.*stages\.3\.blocks\.1\.mlp\.fc2"):
        checkpointer.check(path)
    saved(tmp_path / "published.pth", {"state_dict": {**state, "decode_head.new": torch.ones(1)}})
    with pytest.raises(CheckpointError, match=r"1 not .*sem_seg_head\.semantic_fpn\.new"):
        checkpointer.check(path)


def test_published_baseline_has_no_semantic_layers_for_semask(tmp_path: Path) -> None:
    path = saved(tmp_path / "swin.pth", {"state_dict": published("swin_t_ade20k")})
    with torch.device("meta"):
        checkpointer = SeMaskCheckpointer(Model("semask_t_ade20k"))
    with pytest.raises(CheckpointError, match="semantic layers"):
        checkpointer.check(str(path))


@pytest.mark.parametrize("case", ["semask_t_ade20k", "swin_t_ade20k"])
def test_imagenet_names_of_a_whole_swin(tmp_path: Path, case: str) -> None:
    own = (".semantic_layer.", *(f"backbone.norm{stage}." for stage in range(4)))
    state = {
        name.removeprefix("backbone."): value
        for name, value in published(case).items()
        if name.startswith("backbone.") and not any(part in name for part in own)
    }
    state |= {"norm.weight": torch.ones(768), "head.bias": torch.ones(1000)}
    path = str(saved(tmp_path / "swin.pth", {"model": state}))
    with torch.device("meta"):
        model, larger = Model(case), Model("semask_l_cityscapes")
    SeMaskCheckpointer(model).check(path)
    with pytest.raises(CheckpointError, match=r"missing.*with another shape"):
        SeMaskCheckpointer(larger).check(path)
