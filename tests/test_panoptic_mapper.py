"""The panoptic pipeline against an independent computation of a few lines; odd maps."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

from plain_pipeline import plain_square
from semask.config import load_config
from semask.data.mappers.panoptic import PanopticMapper
from semask.data.segments import panoptic_picture, segment_ids, translated
from semask.errors import ConfigError, DataError
from test_mask_mapper import config as semantic_config

K = 7
HEIGHT, WIDTH = 50, 81


def config(**overrides: Any) -> CfgNode:
    """A small published-style pipeline; keyword ``CROP__SIZE`` is ``INPUT.CROP.SIZE``."""
    names = {"DATASET_MAPPER_NAME": "mask_former_panoptic", "PHOTOMETRIC_DISTORTION": False}
    return semantic_config(**{**names, **overrides})


def entry(folder: Path, number: int = 150) -> tuple[dict[str, Any], np.ndarray]:
    """A dataset dict, and the ids of its map; every fifth segment is a crowd."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    # Ids of up to three bytes, white among them, which some take for padding; 0 = none.
    numbers = np.array([0, 0xFFFFFF, *rng.choice(2**24 - 2, number - 1, replace=False) + 1])
    ids = numbers[np.kron(rng.integers(0, number + 1, (13, 21)), np.ones((4, 4), int))]
    ids = ids[:HEIGHT, :WIDTH]
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(panoptic_picture(ids)).save(folder / "map.png")
    segments = [
        {"id": number, "category_id": int(rng.integers(K)), "iscrowd": int(place % 5 == 4)}
        for place, number in enumerate(numbers[1:].tolist())
        if (ids == number).any()
    ]
    record = {
        "file_name": str(folder / "image.png"),
        "pan_seg_file_name": str(folder / "map.png"),
        "segments_info": segments,
    }
    return record, ids


@pytest.mark.parametrize("keep_empty", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_plain_computation(tmp_path: Path, seed: int, keep_empty: bool) -> None:
    record, ids = entry(tmp_path)
    mapper = PanopticMapper(config(), is_train=True)
    mapper.keep_empty = keep_empty
    np.random.seed(seed)
    output = mapper(record)

    np.random.seed(seed)
    image = Image.open(record["file_name"])
    expected, padded = plain_square(image, ids, offset=0.5, outside=0)
    wanted = [s for s in record["segments_info"] if not s["iscrowd"]]
    wanted = [s for s in wanted if keep_empty or (padded == s["id"]).any()]

    assert np.array_equal(output["image"].permute(1, 2, 0).numpy(), expected)
    assert (output["height"], output["width"]) == (HEIGHT, WIDTH)
    instances = output["instances"]
    assert instances.gt_classes.tolist() == [s["category_id"] for s in wanted]
    assert instances.gt_masks.dtype == torch.bool
    assert instances.gt_masks.shape == (len(wanted), 32, 32)
    target = np.full((32, 32), 255)
    for mask, segment in zip(instances.gt_masks.numpy(), wanted, strict=True):
        assert np.array_equal(mask, padded == segment["id"])
        target[mask] = segment["category_id"]
    assert np.array_equal(output["prior_target"].numpy(), target)
    assert len(wanted) > 8
    assert (instances.gt_masks.sum((1, 2)) == 0).any() == keep_empty


def test_crops_with_one_class_alone_are_drawn_again(tmp_path: Path) -> None:
    """The limit is by class, which two segments can share."""
    ids = np.ones((64, 64), int)
    ids[:, 32:], ids[40:, 40:] = 2, 3
    Image.fromarray(panoptic_picture(ids)).save(tmp_path / "map.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "image.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "pan_seg_file_name": str(tmp_path / "map.png"),
        "segments_info": [{"id": i, "category_id": c} for i, c in ((1, 4), (2, 4), (3, 0))],
    }
    sizes: dict[str, Any] = {"MIN_SIZE_TRAIN": [64], "MAX_SIZE_TRAIN": 64, "SIZE_DIVISIBILITY": -1}
    mapper = PanopticMapper(
        config(CROP__SINGLE_CATEGORY_MAX_AREA=0.999, RANDOM_FLIP="none", **sizes), is_train=True
    )
    np.random.seed(0)
    # One draw in two has the corner of the other class.
    assert all(0 in mapper(record)["instances"].gt_classes.tolist() for _ in range(20))


@pytest.mark.parametrize("size", [(40, 64, 4), (64, 40, 3)])
def test_bands_and_deep_images(tmp_path: Path, size: tuple[int, int, int]) -> None:
    """As in the other tasks: any number of channels, and values in a stated range."""
    height, width, channels = size
    values = np.random.default_rng(0).integers(0, 4096, size).astype(np.uint16)
    np.save(tmp_path / "image.npy", values)
    ids = np.full((height, width), 300)
    Image.fromarray(panoptic_picture(ids)).save(tmp_path / "map.png")
    record = {
        "file_name": str(tmp_path / "image.npy"),
        "pan_seg_file_name": str(tmp_path / "map.png"),
        "segments_info": [{"id": 300, "category_id": 2}],
    }
    cfg = config(VALUE_RANGE=[0, 4095], CROP__ENABLED=False, RANDOM_FLIP="none")
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [100.0] * channels
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (40,), 64
    cfg.INPUT.SIZE_DIVISIBILITY = 64
    sample = PanopticMapper(cfg, is_train=True)(record)
    expected = torch.from_numpy(values.astype(np.float32) / 4095 * 255).permute(2, 0, 1)
    torch.testing.assert_close(sample["image"][:, :height, :width], expected)
    assert sample["image"].shape == (channels, 64, 64)
    assert sample["prior_target"][:height, :width].unique().tolist() == [2]
    assert (sample["prior_target"] == 255).sum() == 64 * 64 - height * width


def changed(folder: Path, ids: np.ndarray) -> None:
    Image.fromarray(panoptic_picture(ids)).save(folder / "map.png")


# For each case what becomes of the ids 5 and 6, of classes 1 and 2, and the words of the warning.
ODD: dict[str, tuple[list[int], list[int], str]] = {
    "a segment that the PNG lacks": ([5, 5], [1], "no pixel of the segments 6 of"),
    "an unknown id": ([5, 77], [1], "no pixel of the segments 6 of.*ids 77"),
    "white": ([5, 0xFFFFFF], [1], "ids 16777215"),
    "nothing but unknown ids": ([77, 78], [], "segments 5, 6 of.*ids 77, 78"),
    "nothing": ([0, 0], [], "segments 5, 6"),
}


@pytest.mark.parametrize("keep_empty", [False, True])
@pytest.mark.parametrize("case", ODD)
def test_what_map_or_json_file_lacks_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, keep_empty: bool
) -> None:
    values, classes, words = ODD[case]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "image.png")
    changed(tmp_path, np.repeat(values, 16)[None].repeat(32, 0))
    segments = [{"id": i, "category_id": c} for i, c in ((5, 1), (6, 2))]
    record = {
        "file_name": str(tmp_path / "image.png"),
        "pan_seg_file_name": str(tmp_path / "map.png"),
        "segments_info": segments,
    }
    sizes: dict[str, Any] = {"MIN_SIZE_TRAIN": [32], "SIZE_DIVISIBILITY": 40}
    mapper = PanopticMapper(config(**sizes), is_train=True)
    mapper.keep_empty = keep_empty
    with caplog.at_level(logging.WARNING, "semask"):
        sample = mapper(record)
    assert sample["instances"].gt_classes.tolist() == classes
    assert set(sample["prior_target"].unique().tolist()) == {*classes, 255}
    (line,) = caplog.messages
    assert "map.png" in line
    assert re.search(words, line)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segments_info": [{"id": 5, "category_id": K}]}, r"map\.png.*NUM_CLASSES"),
        ({"segments_info": [{"id": 5, "category_id": -1}]}, r"map\.png.*NUM_CLASSES"),
        ({"segments_info": [{"id": 5, "category_id": "road"}]}, r"map\.png.*NUM_CLASSES"),
        ({"segments_info": [{"id": 5}]}, r"map\.png.*NUM_CLASSES"),
        ({"segments_info": [{"category_id": 1}]}, r"map\.png.*id"),
        ({"segments_info": [{"id": 0, "category_id": 1}]}, r"map\.png.*id"),
        ({"pan_seg_file_name": None}, r"image\.png.*pan_seg_file_name"),
        ({"width": 99}, r"image\.png.*99"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    record, _ = entry(tmp_path)
    with pytest.raises(DataError, match=words):
        PanopticMapper(config(), is_train=True)(
            {"height": HEIGHT, "width": WIDTH} | record | change
        )


def test_a_map_of_another_size_is_refused(tmp_path: Path) -> None:
    record, ids = entry(tmp_path)
    changed(tmp_path, ids[:-1])
    with pytest.raises(DataError, match=r"image\.png.*map\.png"):
        PanopticMapper(config(), is_train=True)(record)


def test_the_ignore_value_is_no_class() -> None:
    cfg = config()
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = K - 1
    with pytest.raises(ConfigError, match="IGNORE_VALUE"):
        PanopticMapper(cfg, is_train=True)


def test_2000_segments(tmp_path: Path) -> None:
    side, number = 100, 2000
    ids = np.arange(side * side).reshape(side, side) // 5 + 1
    changed(tmp_path, ids)
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / "image.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "pan_seg_file_name": str(tmp_path / "map.png"),
        "segments_info": [{"id": i + 1, "category_id": i % K} for i in range(number)],
    }
    cfg = load_config()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = K
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_panoptic"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.CROP.ENABLED = (side,), False
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.SIZE_DIVISIBILITY = "none", -1
    instances = PanopticMapper(cfg, is_train=True)(record)["instances"]
    assert len(instances) == number
    assert (instances.gt_masks.sum((1, 2)) == 5).all()
    assert instances.gt_classes.tolist() == [i % K for i in range(number)]


def test_maps_are_translated_run_by_run() -> None:
    ids = np.random.default_rng(0).integers(0, 4, (9, 7)) * 70000
    values, found = translated(ids, {70000: 5, 140000: 6}, -1)
    assert found == {0, 70000, 140000, 210000}
    assert np.array_equal(values, np.select([ids == 70000, ids == 140000], [5, 6], -1))
    assert np.array_equal(segment_ids(panoptic_picture(ids)), ids)
