"""Large-scale jitter: sizes, and that image, instances and target stay together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode

from semask.config.loading import load_config
from semask.data.datasets.coco_folder import load_coco_folder
from semask.errors import ConfigError
from semask.tasks import build_task
from tiny_instances import SIDE, SMALL_MODEL, box_annotation, flat, write_dataset

CONFIGS = Path(__file__).parents[1] / "configs"


def config(**overrides: Any) -> CfgNode:
    keys: dict[str, Any] = {
        "INPUT.LSJ.ENABLED": True,
        "INPUT.LSJ.SIZE": [96, 80],
        "INPUT.RANDOM_FLIP": "none",
        **{f"INPUT.LSJ.{key}": value for key, value in overrides.items()},
    }
    path = CONFIGS / "coco/semask_swin_tiny_mask_rcnn_3x.yaml"
    return load_config(str(path), flat({**SMALL_MODEL, **keys}))


def test_image_instances_and_target_stay_together(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [[box_annotation(8, 12, 40, 36)]])
    record = load_coco_folder(str(path), str(tmp_path / "images"))[0]
    mapper = build_task(config()).build_mapper(is_train=True)
    sizes = set()
    for seed in range(8):
        np.random.seed(seed)
        sample = mapper(record)
        height, width = sample["image"].shape[1:]
        sizes.add((height, width))
        assert height <= 96
        assert width <= 80
        inside = sample["prior_target"] == 0
        bright = sample["image"].float().mean(0) > 185
        assert (bright != inside).float().mean() < 0.1
        found = sample["instances"]
        assert len(found) == int(inside.any())
        if len(found):
            assert torch.equal(found.gt_masks.tensor[0].bool(), inside)
    assert len(sizes) > 3
    assert max(sizes)[0] > SIDE


def test_evaluation_is_as_ever() -> None:
    mapper: Any = build_task(config()).build_mapper(is_train=False)
    assert "ResizeShortestEdge" in str(mapper.augmentations.augs)


@pytest.mark.parametrize(
    ("key", "value"),
    [("SCALE", [2.0, 0.1]), ("SCALE", [0.0, 1.0]), ("SCALE", [1.0]), ("SIZE", [0, 9])],
)
def test_values_that_cannot_be_are_named(key: str, value: list[float]) -> None:
    with pytest.raises(ConfigError, match=rf"INPUT\.LSJ\.{key}"):
        build_task(config(**{key: value})).build_mapper(is_train=True)
