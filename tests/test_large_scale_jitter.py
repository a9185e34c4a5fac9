"""Large-scale jitter: sizes, and that image, instances and target stay together."""

from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from semask.config.loading import load_config
from semask.data.datasets.coco_folder import load_coco_folder
from semask.data.mappers.instance import PIPELINES
from semask.data.transforms.resizing import RandomWindow
from semask.errors import ConfigError
from semask.tasks import build_task
from tiny_instances import SIDE, SMALL_MODEL, box_annotation, flat, write_dataset
from tiny_panoptic import register_joint

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


@pytest.mark.parametrize("diagonal", [True, False])
def test_where_windows_lie(diagonal: bool) -> None:
    """The published rule draws one number for both directions, the other one each by itself."""
    image = np.arange(50 * 70).reshape(50, 70)
    found = []
    for seed in range(40):
        np.random.seed(seed)
        window = RandomWindow((20, 90), diagonal=diagonal).get_transform(image).apply_image(image)
        assert window.shape == (20, 70)  # whole where it is smaller
        np.random.seed(seed)
        window = RandomWindow((20, 30), diagonal=diagonal).get_transform(image).apply_image(image)
        y, x = divmod(int(window[0, 0]), 70)
        found.append((y, x))
        if diagonal:
            np.random.seed(seed)
            assert (y, x) == tuple(round(d * u) for u in [np.random.uniform()] for d in (30, 40))
    rows, columns = np.transpose(found)
    assert (rows.min(), columns.min()) < (4, 4)
    assert (rows.max(), columns.max()) > (26, 36)
    assert (abs(np.corrcoef(rows, columns)[0, 1]) > 0.99) == diagonal


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["coco_instance_lsj", "mask_former_instance"])
def test_published_pipelines_of_instances(tmp_path: Path, name: str, keep: bool) -> None:
    """One size; polygons, RLE and target agree, and nothing reaches into the padding."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[30:60, 2:20] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    encoded = {"size": [SIDE, SIDE], "counts": rle["counts"].decode()}
    second = {**box_annotation(2, 30, 18, 30, category=7), "segmentation": encoded}
    path = write_dataset(tmp_path, [[box_annotation(40, 4, 20, 20), second]])
    record = load_coco_folder(str(path), str(tmp_path / "images"))[0]
    cfg = config(SIZE=[80, 80])
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.KEEP_EMPTY_MASKS = name, keep
    cfg.INPUT.LSJ.ENABLED = cfg.INPUT.PHOTOMETRIC_DISTORTION = False
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.SIZE_DIVISIBILITY = "horizontal", 80
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (40, 160), 320
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [80, 80]
    mapper = build_task(cfg).build_mapper(is_train=True)
    numbers = set()
    for seed in range(12):
        np.random.seed(seed)
        sample = mapper(record)
        assert sample["image"].shape == (3, 80, 80)
        found, target = sample["instances"], sample["prior_target"]
        padded = (sample["image"] == 128).all(0)
        assert ((target == 255) == padded).float().mean() > 0.99
        if not len(found):
            numbers.add((0, 0))
            continue
        masks = found.gt_masks.tensor.bool()
        assert not masks[:, target == 255].any()
        numbers.add((len(found), int(masks.flatten(1).any(1).sum())))
        for category, bright in ((0, True), (1, False)):
            inside = masks[found.gt_classes == category].any(0)
            assert torch.equal(inside, target == category)
            pixels = sample["image"].float().mean(0)
            seen = (pixels > 185) if bright else (pixels < 60)
            assert (seen != inside).float().mean() < 0.1
    assert any(visible < 2 for _, visible in numbers)
    for number, visible in numbers:
        assert number == (2 if keep else visible)


@pytest.mark.usefixtures("catalogs")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["coco_panoptic_lsj", "mask_former_panoptic"])
def test_published_pipelines_of_segments(tmp_path: Path, name: str, keep: bool) -> None:
    """A segment of which no pixel is left stays where the key says so, with an empty mask."""
    record = register_joint(tmp_path)[0]
    cfg = load_config(
        str(CONFIGS / "own_dataset/semask_mask2former_panoptic_example.yaml"),
        flat(
            {
                "INPUT.LSJ.SIZE": [80, 80],
                "INPUT.LSJ.SCALE": [0.5, 3.0],
                "INPUT.KEEP_EMPTY_MASKS": keep,
            }
        ),
    )
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = name, 4
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (40, 160), 320
    cfg.INPUT.SIZE_DIVISIBILITY, cfg.INPUT.CROP.SIZE = 80, [80, 80]
    mapper = build_task(cfg).build_mapper(is_train=True)
    kept = set()
    for seed in range(12):
        np.random.seed(seed)
        sample = mapper(record)
        assert sample["image"].shape == (3, 80, 80)
        masks, classes = sample["instances"].gt_masks, sample["instances"].gt_classes
        visible = masks.flatten(1).any(1)
        assert len(classes) == (4 if keep else int(visible.sum()))
        kept.add(int(visible.sum()))
        target = sample["prior_target"]
        for mask, category in zip(masks, classes, strict=True):
            assert torch.equal(mask, target == category)  # each class has one segment
        assert torch.equal(masks.any(0), target != 255)
    assert min(kept) < 4


def test_a_mapper_that_is_not_there_is_named() -> None:
    cfg = config()
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsg"
    with pytest.raises(ConfigError, match=r"INPUT\.DATASET_MAPPER_NAME.*coco_instance_lsj"):
        build_task(cfg).build_mapper(is_train=True)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("name", PIPELINES)
def test_very_thin_images_are_not_resized_to_nothing(name: str, is_train: bool) -> None:
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(20,)", "INPUT.MAX_SIZE_TRAIN", "30"]
    sizes += ["INPUT.MIN_SIZE_TEST", "20", "INPUT.MAX_SIZE_TEST", "30", "INPUT.LSJ.SIZE", "[64,64]"]
    cfg = load_config("coco/semask_swin_tiny_mask_rcnn_1x", sizes)
    cfg.defrost()
    cfg.INPUT.DATASET_MAPPER_NAME = name
    for shape in ((1, 900, 3), (900, 1, 3)):
        inputs = T.AugInput(np.full(shape, 7, np.uint8))
        T.AugmentationList(PIPELINES[name](cfg, is_train))(inputs)
        assert min(inputs.image.shape[:2]) >= 1
