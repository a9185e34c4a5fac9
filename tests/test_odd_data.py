"""Unusual but valid data: training and evaluation complete."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from semask.config.loading import load_config
from semask.engine import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def odd_data(folder: Path, kind: str) -> list[dict[str, Any]]:
    """An unusual but valid dataset."""
    sizes = {
        "one pixel high": [(1, 37), (1, 5), (29, 1)],
        "smaller than a window": [(3, 2), (2, 3)],
    }
    count = 1 if kind == "one image" else 3
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for index, size in enumerate(sizes.get(kind, [(40, 40)] * count)):
        image = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        label = rng.integers(0, 3, size, dtype=np.uint8)
        if kind == "all ignored" or (kind == "one ignored" and index == 0):
            label[:] = 255
        elif kind == "absent class":
            label[label == 2] = 0
        record = {
            key: str(folder / f"{key}{index}.png") for key in ("file_name", "sem_seg_file_name")
        }
        Image.fromarray(image).save(record["file_name"])
        Image.fromarray(label).save(record["sem_seg_file_name"])
        records.append(record)
    return records


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["one image", "all ignored", "one ignored", "absent class"]
    + ["one pixel high", "smaller than a window"],
)
def test_odd_data(tmp_path: Path, kind: str, crop: bool) -> None:
    """With ``valid`` pixels in the mean, too."""
    overrides = [
        *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", 3),
        *("TEST.NUM_PANELS", 0, "TEST.REPORT", False),
        *("DATASETS.TRAIN", "('tiny_odd',)", "DATASETS.TEST", "('tiny_odd',)"),
        *("INPUT.CROP.ENABLED", crop, "MODEL.SEM_SEG_HEAD.OHEM_PIXELS", 50),
        *("MODEL.SEM_SEG_HEAD.LOSS_REDUCTION", "all" if crop else "valid"),
        *("SOLVER.IMS_PER_BATCH", 2 if crop else 1, "TEST.EVAL_PERIOD", 0),
    ]
    cfg = load_config(
        tiny.write_config(tmp_path / "config.yaml"), [str(value) for value in overrides]
    )
    tiny.register("tiny_odd", odd_data(tmp_path / "odd", kind))
    try:
        trainer = Trainer(cfg)
        trainer.train()
    finally:
        tiny.unregister("tiny_odd")
    metrics = trainer.results["sem_seg"]
    for value in trainer.model.state_dict().values():
        assert torch.isfinite(value).all()
    losses = trainer.storage.history("total_loss").values()
    assert all(
        (value == 0) == (kind == "all ignored") for value, _ in losses if kind != "one ignored"
    )
    if kind == "absent class":
        assert math.isnan(metrics["IoU-right"]) or metrics["IoU-right"] == 0
    assert math.isnan(metrics["mIoU"]) == (kind == "all ignored")
