"""From files to what the model takes: the mapper alone and inside Detectron2's data loaders."""

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data import transforms as T
from PIL import Image

from semask.config.loading import load_config
from semask.data import reading
from semask.data.mappers.semantic import SemSegMapper, build_augmentations
from semask.data.reading import register_label_map
from semask.data.transforms.geometry import PadToSize, ResizeByScale
from semask.data.transforms.photometric import PhotometricDistortion
from semask.errors import ConfigError, DataError

K = 5
CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("[!_]*/*.yaml"))


def config(**overrides: Any) -> CfgNode:
    """A small published-style pipeline; keyword ``CROP__SIZE`` is ``INPUT.CROP.SIZE``."""
    cfg = load_config()
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = K
    cfg.INPUT.SCALE = [128, 48]
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [48, 48]
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.75
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    for key, value in overrides.items():
        cfg.merge_from_list(["INPUT." + key.replace("__", "."), value])
    return cfg


def noise(*shape: int, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint8)


def entry(folder: Path, height: int = 60, width: int = 90, seed: int = 0) -> dict[str, Any]:
    """A dataset dict with its two files."""
    image, label = noise(height, width, 3, seed=seed), noise(height, width, high=K, seed=seed)
    label[:3] = 255
    paths = {"file_name": folder / f"{seed}_image.png", "sem_seg_file_name": folder / f"{seed}.png"}
    Image.fromarray(image).save(paths["file_name"])
    Image.fromarray(label).save(paths["sem_seg_file_name"])
    return {**{key: str(path) for key, path in paths.items()}, "image_id": seed}


def pixels(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(Image.open(sample["file_name"])), np.asarray(
        Image.open(sample["sem_seg_file_name"])
    )


# ---- training ----


def test_training_output(tmp_path: Path) -> None:
    sample = entry(tmp_path)
    before = dict(sample)
    output = SemSegMapper(config(), is_train=True)(sample)
    assert sample == before
    assert {key: output[key] for key in before} == before
    assert (output["height"], output["width"]) == (60, 90)
    assert output["image"].shape == (3, 48, 48)
    assert output["sem_seg"].shape == (48, 48)
    assert output["sem_seg"].dtype == torch.int64
    assert output["image"].is_contiguous()


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_the_whole_pipeline(tmp_path: Path, factor: float) -> None:
    """All steps in order with the same random numbers, in OpenCV and NumPy."""
    sample = entry(tmp_path)
    mapper = SemSegMapper(config(SCALE_FACTORS=[factor]), is_train=True)
    distortion = PhotometricDistortion()
    image, label = pixels(sample)
    ratio = min(int(128 * factor) / 90, int(48 * factor) / 60)
    size = (int(90 * ratio + 0.5), int(60 * ratio + 0.5))
    for seed in range(12):
        np.random.seed(seed)
        output = mapper(sample)

        np.random.seed(seed)
        np.random.randint(1)  # the factor
        x_image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        x_label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
        height, width = min(48, size[1]), min(48, size[0])
        y, x = np.random.randint(size[1] - height + 1), np.random.randint(size[0] - width + 1)
        x_image, x_label = (part[y : y + height, x : x + width] for part in (x_image, x_label))
        if np.random.uniform(0, 1) < 0.5:
            x_image, x_label = x_image[:, ::-1], x_label[:, ::-1]
        x_image = distortion.get_transform(x_image).apply_image(x_image)

        result = output["image"].permute(1, 2, 0).numpy()
        assert result.dtype == (np.uint8 if factor >= 1 else np.float32)
        assert result.shape == (48, 48, 3)
        assert np.array_equal(result[:height, :width], x_image)
        mean = np.array([123.675, 116.28, 103.53], np.float32)
        assert (result[height:] == mean).all()
        assert (result[:, width:] == mean).all()
        sem_seg = output["sem_seg"].numpy()
        assert np.array_equal(sem_seg[:height, :width], x_label)
        assert (sem_seg[height:] == 255).all()
        assert (sem_seg[:, width:] == 255).all()


def test_same_seed_same_output_and_pickling(tmp_path: Path) -> None:
    sample = entry(tmp_path)
    mapper = SemSegMapper(config(), is_train=True)
    outputs = []
    for each in (mapper, mapper, pickle.loads(pickle.dumps(mapper))):
        np.random.seed(7)
        outputs.append([each(sample) for _ in range(4)])
    for other in outputs[1:]:
        for one, two in zip(outputs[0], other, strict=True):
            assert torch.equal(one["image"], two["image"])
            assert torch.equal(one["sem_seg"], two["sem_seg"])
    assert not torch.equal(outputs[0][0]["image"], outputs[0][1]["image"])


def test_bgr_is_the_same_picture(tmp_path: Path) -> None:
    sample = entry(tmp_path)
    cfg = config(FORMAT="BGR", SCALE_FACTORS=[0.5, 1.0])
    cfg.MODEL.PIXEL_MEAN = [103.53, 116.28, 123.675]
    rgb_mapper = SemSegMapper(config(SCALE_FACTORS=[0.5, 1.0]), is_train=True)
    bgr_mapper = SemSegMapper(cfg, is_train=True)
    dtypes = set()
    for seed in range(8):
        np.random.seed(seed)
        rgb = rgb_mapper(sample)["image"]
        np.random.seed(seed)
        bgr = bgr_mapper(sample)["image"]
        assert torch.equal(bgr, rgb.flip(0))
        dtypes.add(bgr.dtype)
    assert dtypes == {torch.uint8, torch.float32}


def test_without_crop_nothing_is_padded(tmp_path: Path) -> None:
    cfg = config(CROP__ENABLED=False, SCALE_FACTORS=[0.5], PHOTOMETRIC_DISTORTION=False)
    output = SemSegMapper(cfg, is_train=True)(entry(tmp_path))
    assert output["image"].shape == (3, 24, 36)
    assert output["image"].dtype == torch.uint8
    assert output["sem_seg"].shape == (24, 36)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("crop", [True, False])
def test_tiny_images(tmp_path: Path, size: tuple[int, int], crop: bool) -> None:
    sample = entry(tmp_path, *size)
    mapper = SemSegMapper(config(CROP__ENABLED=crop, SCALE=[4, 4]), is_train=True)
    for seed in range(6):
        np.random.seed(seed)
        output = mapper(sample)
        assert output["image"].shape[1:] == output["sem_seg"].shape
        assert (output["height"], output["width"]) == size


def test_label_map_of_the_entry_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LABEL_MAPS", {})
    register_label_map("one_based", [255, *range(K)])
    plain, raw = entry(tmp_path), entry(tmp_path, seed=1)
    label = noise(60, 90, high=K + 1, seed=1)
    Image.fromarray(label).save(raw["sem_seg_file_name"])
    raw["label_map"] = "one_based"
    mapper = SemSegMapper(
        is_train=True, augmentations=[], num_classes=K, ignore_value=255, image_format="RGB"
    )
    assert np.array_equal(mapper(plain)["sem_seg"].numpy(), pixels(plain)[1])
    output = mapper(raw)
    expected = np.where(label == 0, 255, label.astype(int) - 1)
    assert np.array_equal(output["sem_seg"].numpy(), expected)
    assert output["label_map"] == "one_based"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_every_kind(tmp_path: Path, mode: str) -> None:
    sample = entry(tmp_path)
    image = Image.open(sample["file_name"])
    sample["file_name"] = str(tmp_path / "other.tif")
    if mode == "I;16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16)).save(sample["file_name"])
    else:
        image.convert(mode).save(sample["file_name"])
    output = SemSegMapper(config(SCALE_FACTORS=[1.0]), is_train=True)(sample)
    assert output["image"].shape == (3, 48, 48)
    assert output["image"].dtype == torch.uint8


# ---- evaluation ----


def test_evaluation_output(tmp_path: Path) -> None:
    sample = entry(tmp_path, 61, 83)
    Path(sample["sem_seg_file_name"]).unlink()  # it is the evaluator's to read
    mapper = SemSegMapper(config(), is_train=False)
    output = mapper(sample)
    image = np.asarray(Image.open(sample["file_name"]))
    expected = cv2.resize(image, (65, 48), interpolation=cv2.INTER_LINEAR)  # 83 * 48 / 61 = 65.3
    assert np.array_equal(output["image"].permute(1, 2, 0).numpy(), expected)
    assert output["image"].dtype == torch.uint8
    assert "sem_seg" not in output
    assert {key: output[key] for key in sample} == sample
    assert (output["height"], output["width"]) == (61, 83)
    assert torch.equal(mapper(sample)["image"], output["image"])


def test_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "a.jpg", exif=exif)
    sample = {"file_name": str(tmp_path / "a.jpg"), "height": 20, "width": 30}
    output = SemSegMapper(config(), is_train=False)(sample)
    assert (output["height"], output["width"]) == (30, 20)
    assert output["image"].shape == (3, 72, 48)


# ---- refusals ----


def break_nothing_but_the_size(sample: dict[str, Any]) -> None:
    Image.fromarray(noise(60, 89, high=K)).save(sample["sem_seg_file_name"])


def break_a_value(sample: dict[str, Any]) -> None:
    label = noise(60, 90, high=K)
    label[0, :7] = K
    Image.fromarray(label).save(sample["sem_seg_file_name"])


def break_the_channels(sample: dict[str, Any]) -> None:
    Image.fromarray(noise(60, 90, 3, high=K)).save(sample["sem_seg_file_name"])


def break_the_image(sample: dict[str, Any]) -> None:
    path = Path(sample["file_name"])
    path.write_bytes(path.read_bytes()[:2000])


def break_the_label(sample: dict[str, Any]) -> None:
    path = Path(sample["sem_seg_file_name"])
    path.write_bytes(path.read_bytes()[:200])


def remove_the_image(sample: dict[str, Any]) -> None:
    Path(sample["file_name"]).unlink()


def remove_the_label(sample: dict[str, Any]) -> None:
    Path(sample["sem_seg_file_name"]).unlink()


def leave_the_label_out(sample: dict[str, Any]) -> None:
    del sample["sem_seg_file_name"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_but_the_size, r"0_image\.png' is 90x60 .*0\.png' is 89x60"),
        (break_a_value, rf"0\.png.* {K} \(7 pixels\).*0\.\.{K - 1} and 255"),
        (break_the_channels, r"0\.png' has 3 channels"),
        (break_the_image, r"Cannot read image '.*0_image\.png'"),
        (break_the_label, r"Cannot read label map '.*0\.png'"),
        (remove_the_image, r"no image '.*0_image\.png'"),
        (remove_the_label, r"no label map '.*0\.png'"),
        (leave_the_label_out, r"0_image\.png' has no label map.*sem_seg_file_name"),
    ],
)
def test_bad_files(tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    sample = entry(tmp_path)
    damage(sample)
    with pytest.raises(DataError, match=message):
        SemSegMapper(config(), is_train=True)(sample)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SCALE", [512, 2048], r"INPUT\.SCALE.*\(long, short\)"),
        ("SCALE", ["a", "b"], r"INPUT\.SCALE"),
        ("SCALE_FACTORS", [], r"SCALE_FACTORS.*positive"),
        ("SCALE_SAMPLING", "uniform", r"SCALE_SAMPLING.*'choice' or 'range', not 'uniform'"),
        ("SCALE_SAMPLING", "range", r"SCALE_FACTORS.*two factors"),
        ("CROP__TYPE", "relative_range", r"INPUT\.CROP\.TYPE.*'relative_range'.*'absolute'"),
        ("CROP__SIZE", [0.9, 0.9], r"INPUT\.CROP.*\(height, width\) in whole pixels"),
        ("CROP__SINGLE_CATEGORY_MAX_AREA", 0.0, r"INPUT\.CROP.*category limit"),
        ("RANDOM_FLIP", "vertical", r"INPUT\.RANDOM_FLIP is 'vertical'.*'horizontal' or 'none'"),
        ("FORMAT", "YUV-BT.601", r"INPUT\.FORMAT is 'YUV-BT\.601'; use 'RGB' or 'BGR'"),
    ],
)
def test_bad_config_values_name_their_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SemSegMapper(config(**{key: value}), is_train=True)


def test_training_has_255_classes_at_most() -> None:
    options: dict[str, Any] = {"augmentations": [], "num_classes": 256}
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 256.* 255 at most"):
        SemSegMapper(is_train=True, **options)
    SemSegMapper(is_train=False, **options)  # to predict, no label maps are needed


def test_ignore_value_has_to_fit_into_a_label_map() -> None:
    cfg = config()
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = -1
    with pytest.raises(ConfigError, match=r"IGNORE_VALUE is -1.*0\.\.255"):
        SemSegMapper(cfg, is_train=True)


def test_config_chooses_the_augmentations() -> None:
    def names(is_train: bool = True, **overrides: Any) -> list[str]:
        built = build_augmentations(config(**overrides), is_train)
        return [type(augmentation).__name__ for augmentation in built]

    everything = [
        "ResizeByScale",
        "RandomCropWithCategoryLimit",
        "RandomFlip",
        "PhotometricDistortion",
        "PadToSize",
    ]
    assert names() == everything
    assert names(is_train=False) == everything[:1]
    assert names(RANDOM_FLIP="none", PHOTOMETRIC_DISTORTION=False) == [
        everything[0],
        everything[1],
        everything[4],
    ]
    assert names(CROP__ENABLED=False) == [everything[0], everything[2], everything[3]]
    resize = build_augmentations(
        config(SCALE_FACTORS=[0.5, 2.0], SCALE_SAMPLING="range"), is_train=True
    )[0]
    assert isinstance(resize, ResizeByScale)
    assert (resize.scale, resize.factors, resize.sampling) == ((128, 48), (0.5, 2.0), "range")


def test_every_shipped_config_of_semantic_segmentation_describes_a_pipeline() -> None:
    configs = {path: load_config(str(path)) for path in CONFIGS}
    semantic = {path: cfg for path, cfg in configs.items() if cfg.TASK == "semantic"}
    assert len(semantic) > 60
    for path, cfg in semantic.items():
        training = SemSegMapper(cfg, is_train=True).augmentations.augs
        assert isinstance(training[0], ResizeByScale), path
        assert isinstance(training[-1], PadToSize), path
        assert training[-1].size == tuple(cfg.INPUT.CROP.SIZE), path
        assert len(SemSegMapper(cfg, is_train=False).augmentations.augs) == 1, path


# ---- inside Detectron2's loaders ----


@pytest.mark.parametrize("workers", [0, 1])
def test_training_loader(tmp_path: Path, workers: int) -> None:
    samples = [entry(tmp_path, 50 + 5 * seed, 90, seed) for seed in range(3)]
    loader = build_detection_train_loader(
        samples,
        mapper=SemSegMapper(config(), is_train=True),
        total_batch_size=2,
        num_workers=workers,
        aspect_ratio_grouping=False,
    )
    seen = set()
    for batch in itertools.islice(loader, 4):
        assert len(batch) == 2
        for output in batch:
            assert output["image"].shape == (3, 48, 48)
            assert output["sem_seg"].shape == (48, 48)
            assert set(output["sem_seg"].unique().tolist()) <= {*range(K), 255}
            seen.add(output["image_id"])
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_file_inside_the_loader_is_named(tmp_path: Path, workers: int) -> None:
    sample = entry(tmp_path)
    break_a_value(sample)
    loader = build_detection_train_loader(
        [sample],
        mapper=SemSegMapper(config(), is_train=True),
        total_batch_size=1,
        num_workers=workers,
        aspect_ratio_grouping=False,
    )
    with pytest.raises(DataError, match=r"0\.png'"):
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_loader(tmp_path: Path, workers: int) -> None:
    samples = [entry(tmp_path, 60, 90, seed) for seed in range(2)]
    mapper = SemSegMapper(config(), is_train=False)
    outputs = [
        output
        for batch in build_detection_test_loader(samples, mapper=mapper, num_workers=workers)
        for output in batch
    ]
    assert [output["image_id"] for output in outputs] == [0, 1]
    assert torch.equal(outputs[1]["image"], mapper(samples[1])["image"])


def test_stock_transforms_work_beside_ours(tmp_path: Path) -> None:
    mapper = SemSegMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge(32), T.RandomFlip(prob=1.0), PhotometricDistortion()],
        num_classes=K,
    )
    output = mapper(entry(tmp_path))
    assert output["image"].shape == (3, 32, 48)
    assert output["sem_seg"].shape == (32, 48)
