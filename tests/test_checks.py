"""Mistakes in a config are refused before anything is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode

import tiny
from semask.config.loading import load_config
from semask.engine import check_run
from semask.errors import ConfigError


@pytest.fixture
def tiny_cfg(tmp_path: Path) -> Iterator[CfgNode]:
    path = tiny.write_config(tmp_path / "config.yaml")
    with tiny.datasets(tmp_path):
        yield load_config(path, ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.MAX_ITER", 0, "SOLVER.MAX_ITER is 0; it must be greater than 0"),
        ("SOLVER.BASE_LR", -1.0, "SOLVER.BASE_LR is -1.0"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD is 0"),
        ("SOLVER.WARMUP_ITERS", -3, "SOLVER.WARMUP_ITERS is -3; it must be 0 or more"),
        ("SOLVER.BETAS", [0.9], "SOLVER.BETAS is .* it needs 2 numbers"),
        ("MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_MEAN has 1 numbers and"),
        ("DATALOADER.NUM_WORKERS", -1, "DATALOADER.NUM_WORKERS is -1"),
        ("MODEL.SWIN.DEPTHS", ["a", "b"], "DEPTHS needs whole numbers"),
        ("MODEL.SWIN.DEPTHS", [1, -1], "DEPTHS"),
        ("MODEL.SWIN.EMBED_DIM", 0, "EMBED_DIM"),
        ("MODEL.SWIN.DROP_PATH_RATE", 1.0, "DROP_PATH_RATE"),
        ("MODEL.SEMASK.NUM_BLOCKS", [-1, 1], "NUM_BLOCKS"),
        ("MODEL.SEM_SEG_HEAD.LOSS_REDUCTION", "mean", "LOSS_REDUCTION must be one of"),
        ("MODEL.SEM_SEG_HEAD.OHEM_PIXELS", -5, "OHEM_PIXELS"),
        ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 0, "CONVS_DIM"),
        ("MODEL.SEM_SEG_HEAD.NORM", "XX", "cannot be built"),
    ],
)
def test_values_that_cannot_work(tiny_cfg: CfgNode, key: str, value: Any, message: str) -> None:
    node = tiny_cfg
    *path, name = key.split(".")
    for part in path:
        node = node[part]
    node[name] = value
    with pytest.raises(ConfigError, match=message):
        check_run(tiny_cfg)
    assert not Path(tiny_cfg.OUTPUT_DIR).exists()


def test_a_protocol_that_the_architecture_does_not_know(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    tiny_cfg.TEST.PROTOCOL = "slide"
    with pytest.raises(ConfigError, match=r"TEST\.PROTOCOL"):
        check_run(tiny_cfg)


def test_resuming_from_another_model_is_refused_before_anything_changes(tiny_cfg: CfgNode) -> None:
    folder = Path(tiny_cfg.OUTPUT_DIR)
    folder.mkdir(parents=True)
    weight = torch.zeros(3, 3)
    torch.save({"model": {"backbone.stages.0.blocks.0.weight": weight}}, folder / "model.pth")
    (folder / "last_checkpoint").write_text("model.pth")
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="does not fit"):
        check_run(tiny_cfg, resume=True)
    assert sorted(folder.iterdir()) == before


def test_an_output_folder_inside_a_file(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .* cannot be created"):
        check_run(tiny_cfg)
