"""The mask-classification pipeline against independent computations of a few lines."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

from plain_pipeline import plain_square
from semask.config import load_config
from semask.data.mappers.mask_semantic import (
    MaskFormerSemanticMapper,
    build_mask_augmentations,
)
from semask.data.mappers.semantic import build_semantic_mapper
from semask.data.transforms.photometric import PhotometricDistortion
from semask.data.transforms.resizing import PadToSquare, ResizeShortEdge
from semask.errors import ConfigError
from semask.modeling.meta_arch.targets import class_masks

K = 7


def config(**overrides: Any) -> CfgNode:
    """A small published-style pipeline; keyword ``CROP__SIZE`` is ``INPUT.CROP.SIZE``."""
    cfg = load_config()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = K
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 30, 44)
    cfg.INPUT.MAX_SIZE_TRAIN = 60
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [32, 32]
    cfg.INPUT.SIZE_DIVISIBILITY = 32
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 24, 100
    for key, value in overrides.items():
        cfg.merge_from_list(["INPUT." + key.replace("__", "."), value])
    return cfg


def entry(folder: Path, height: int = 50, width: int = 81) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    label = np.kron(rng.integers(0, K, (7, 11)), np.ones((8, 8)))[:height, :width].astype(np.uint8)
    label[:4] = 255
    paths = {"file_name": folder / "image.png", "sem_seg_file_name": folder / "label.png"}
    Image.fromarray(image).save(paths["file_name"])
    Image.fromarray(label).save(paths["sem_seg_file_name"])
    return {key: str(path) for key, path in paths.items()}


@pytest.mark.parametrize("crop", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("distorted", [False, True])
@pytest.mark.parametrize("rule", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_plain_computation(
    tmp_path: Path, rule: str, seed: int, distorted: bool, crop: tuple[int, int]
) -> None:
    """Squares, padded; and crops of another shape as for Cityscapes, which are not."""
    sample = entry(tmp_path)
    side = 32 if crop == (32, 32) else 0
    cfg = config(
        LABEL_INTERPOLATION=rule,
        PHOTOMETRIC_DISTORTION=distorted,
        CROP__SIZE=list(crop),
        SIZE_DIVISIBILITY=side or -1,
    )
    np.random.seed(seed)
    output = MaskFormerSemanticMapper(cfg, is_train=True)(sample)

    np.random.seed(seed)
    image, label = (
        Image.open(sample["file_name"]),
        np.asarray(Image.open(sample["sem_seg_file_name"])),
    )
    height, width = label.shape
    offset = 0.5 if rule == "nearest-exact" else 0.0
    expected, expected_label = plain_square(
        image, label, offset=offset, outside=255, crop=crop, side=side, distorted=distorted
    )

    assert output["image"].dtype == torch.uint8
    assert np.array_equal(output["image"].permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(output["sem_seg"].numpy(), expected_label)
    assert (output["height"], output["width"]) == (height, width)
    instances = output["instances"]
    classes = sorted(set(expected_label.flatten()) - {255})
    assert instances.gt_classes.tolist() == classes
    assert instances.gt_masks.dtype == torch.bool
    for mask, class_id in zip(instances.gt_masks, classes, strict=True):
        assert np.array_equal(mask.numpy(), expected_label == class_id)


def test_halving_by_the_two_rules() -> None:
    """Spec: halving 0..7 gives 0 2 4 6 by PyTorch's rule and 1 3 5 7 by Pillow's."""
    image, label = np.zeros((8, 8, 3), np.uint8), np.tile(np.arange(8, dtype=np.uint8), (8, 1))
    for rule, expected in (("nearest", [0, 2, 4, 6]), ("nearest-exact", [1, 3, 5, 7])):
        resize = ResizeShortEdge([4], label_interpolation=rule).get_transform(image)
        assert resize.apply_segmentation(label)[0].tolist() == expected
        assert resize.apply_segmentation(label).dtype == np.uint8


def test_larger_images_are_cut_to_the_square() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 20, 3)).astype(np.uint8)
    pad = PadToSquare(32).get_transform(image)
    padded = pad.apply_image(image)
    assert padded.shape == (32, 32, 3)
    assert np.array_equal(padded[:, :20], image[:32])
    assert (padded[:, 20:] == 128).all()
    label = pad.apply_segmentation(image[..., 0])
    assert (label[:, 20:] == 255).all()


def test_hue_reaches_both_ends() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    hues = {}
    for inclusive in (False, True):
        np.random.seed(0)
        distortion = PhotometricDistortion(hue_inclusive=inclusive)
        drawn = [distortion.get_transform(image).hue for _ in range(3000)]
        hues[inclusive] = {hue for hue in drawn if hue is not None}
    assert (min(hues[False]), max(hues[False])) == (-18, 17)
    assert (min(hues[True]), max(hues[True])) == (-18, 18)


def test_masks_of_an_image_without_a_class() -> None:
    instances = class_masks(torch.full((4, 5), 255), 255)
    assert len(instances) == 0
    assert instances.gt_masks.shape == (0, 4, 5)


@pytest.mark.parametrize("from_resized", [False, True])
def test_multi_scale_images(tmp_path: Path, from_resized: bool) -> None:
    cfg = config()
    cfg.TEST.PROTOCOL = "multi_scale"
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (16, 40), 60
    cfg.TEST.AUG.FROM_RESIZED = from_resized
    sample = entry(tmp_path)
    output = MaskFormerSemanticMapper(cfg, is_train=False)(sample)
    whole = Image.open(sample["file_name"]).resize((39, 24), Image.Resampling.BILINEAR)
    assert np.array_equal(output["image"].permute(1, 2, 0).numpy(), np.asarray(whole))
    source = whole if from_resized else Image.open(sample["file_name"])
    for size, found in zip((16, 40), output["images"], strict=True):
        factor = min(size / min(source.size), 60 / max(source.size))
        new = [int(side * factor + 0.5) for side in source.size]
        expected = source.resize((new[0], new[1]), Image.Resampling.BILINEAR)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert "instances" not in output


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("LABEL_INTERPOLATION", "bilinear"),
        ("MIN_SIZE_TRAIN", (0, 20)),
        ("RANDOM_FLIP", "both"),
        ("CROP__TYPE", "relative"),
    ],
)
def test_refusals_name_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="INPUT.*" + key.replace("__", r"\.")):
        build_mask_augmentations(config(**{key: value}), is_train=True)


def test_config_names_the_mapper(tmp_path: Path) -> None:
    cfg = config()
    assert isinstance(build_semantic_mapper(cfg, is_train=True), MaskFormerSemanticMapper)
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_panoptic"
    with pytest.raises(ConfigError, match=r"INPUT\.DATASET_MAPPER_NAME.*mask_former_semantic"):
        build_semantic_mapper(cfg, is_train=True)


def test_nothing_is_drawn_from_the_python_generator(tmp_path: Path) -> None:
    """A resumed run repeats NumPy's numbers alone."""
    before = random.getstate()
    MaskFormerSemanticMapper(config(), is_train=True)(entry(tmp_path))
    assert random.getstate() == before
