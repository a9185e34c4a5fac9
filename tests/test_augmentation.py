"""The geometric training steps against a few independent lines of NumPy and OpenCV."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from semask.data.transforms.geometry import (
    OpenCVResizeTransform,
    PadToSize,
    RandomCropWithCategoryLimit,
    ResizeByScale,
    planes,
    scaled_size,
)
from semask.data.transforms.photometric import PhotometricDistortion

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def noise(*shape: int, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint8)


# ---- resize ----


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((256, 256), (2048, 512), (512, 512)),
        ((683, 512), (2048, 512), (683, 512)),
        ((1024, 2048), (2048, 1024), (1024, 2048)),
        ((100, 1000), (2048, 512), (205, 2048)),  # the long side decides; 204.8 rounds up
        ((3, 10), (5, 5), (2, 5)),  # 1.5 rounds up
        ((1, 2000), (100, 50), (1, 100)),  # never 0
        ((360, 480), (1024, 256), (256, 341)),  # 341.33 rounds down
    ],
)
def test_scaled_size(
    size: tuple[int, int], scale: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert scaled_size(*size, scale) == expected
    assert scaled_size(*size[::-1], scale) == expected[::-1]


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 0.61803])
def test_size_of_many_images(factor: float) -> None:
    rng = np.random.default_rng(1)
    resize = ResizeByScale((1021, 333), (factor,))
    long, short = int(1021 * factor), int(333 * factor)
    for height, width in rng.integers(1, 3000, (300, 2)).tolist():
        by_long, by_short = long / max(height, width), short / min(height, width)
        ratio = by_long if by_long < by_short else by_short
        transform = resize.get_transform(np.empty((height, width, 0), np.uint8))
        expected = (int(height * ratio + 0.5) or 1, int(width * ratio + 0.5) or 1)
        assert (transform.new_h, transform.new_w) == expected


def test_one_of_the_factors_is_taken_each_as_often() -> None:
    np.random.seed(0)
    factors = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    resize = ResizeByScale((2048, 512), factors)
    image = np.empty((512, 600, 3), np.uint8)
    heights = [resize.get_transform(image).new_h for _ in range(1200)]
    counts = {height: heights.count(height) for height in set(heights)}
    assert sorted(counts) == [256, 384, 512, 640, 768, 896]
    assert min(counts.values()) > 150


def test_factors_of_a_range_are_uniform() -> None:
    np.random.seed(0)
    resize = ResizeByScale((2048, 1024), (0.5, 2.0), "range")
    image = np.empty((1024, 2048, 3), np.uint8)
    heights = np.array([resize.get_transform(image).new_h for _ in range(1500)])
    assert heights.min() < 520
    assert heights.max() > 2030
    counts = np.histogram(heights, bins=6, range=(512, 2048))[0]
    assert counts.sum() == 1500
    assert counts.min() > 190


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation between pixel centres, without antialiasing, in float64."""

    def taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
        low = position.astype(int)
        return low, np.minimum(low + 1, size - 1), position - low

    top, bottom, y = taps(image.shape[0], height)
    left, right, x = taps(image.shape[1], width)
    rows = image[top] * (1 - y)[:, None, None] + image[bottom] * y[:, None, None]
    return rows[:, left] * (1 - x)[:, None] + rows[:, right] * x[:, None]


@pytest.mark.parametrize("size", [(20, 30), (53, 71), (90, 40), (47, 61), (1, 5)])
def test_image_is_resized_bilinearly_without_antialiasing(size: tuple[int, int]) -> None:
    image = noise(47, 61, 3)
    resized = OpenCVResizeTransform(47, 61, *size).apply_image(image)
    assert resized.dtype == np.uint8
    assert resized.shape == (*size, 3)
    assert np.abs(resized - bilinear(image, *size)).max() <= 1  # OpenCV's fixed-point weights
    if size == (20, 30):
        pillow = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        assert np.abs(pillow - bilinear(image, *size)).max() > 30


@pytest.mark.parametrize("size", [(20, 30), (53, 71), (94, 122), (47, 61), (1, 5)])
def test_label_is_resized_to_the_nearest(size: tuple[int, int]) -> None:
    label = noise(47, 61)
    rows, columns = (
        np.floor(np.arange(new) * (1 / (new / old))).astype(int)
        for new, old in zip(size, label.shape, strict=True)
    )
    resized = OpenCVResizeTransform(47, 61, *size).apply_segmentation(label)
    assert np.array_equal(resized, label[rows][:, columns])


def test_resize_moves_coordinates_and_back() -> None:
    transform = OpenCVResizeTransform(10, 20, 30, 10)
    corner = np.array([[20.0, 10.0], [0.0, 0.0]])
    moved = transform.apply_coords(corner)
    assert moved.tolist() == [[10, 30], [0, 0]]
    assert transform.inverse().apply_coords(moved).tolist() == corner.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((512,),), "long, short"),
        (((512, 2048),), "long, short"),
        (((512, 0),), "long, short"),
        (((2048, 512), ()), "positive"),
        (((2048, 512), (1.0, -1.0)), "positive"),
        (((2048, 512), (0.5, 2.0), "uniform"), "'choice' or 'range', not 'uniform'"),
        (((2048, 512), (0.5, 1.0, 2.0), "range"), "two factors"),
        (((2048, 512), (2.0, 0.5), "range"), "two factors"),
    ],
)
def test_resize_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResizeByScale(*arguments)


# ---- crop ----


def has_variety(label: np.ndarray, limit: float) -> bool:
    classes, counts = np.unique(label[label != 255], return_counts=True)
    return len(classes) > 1 and counts.max() / counts.sum() < limit


def patchy_label() -> np.ndarray:
    """Mostly class 0, with a few small places where there is more, and ignored stripes."""
    label = np.zeros((120, 160), np.uint8)
    label[30:60, 90:130], label[35:50, 95:110], label[100:, :10] = 1, 2, 3
    label[::7] = 255
    return label


@pytest.mark.parametrize("limit", [0.75, 0.5, 1.0])
def test_crop_is_the_first_varied_one_of_ten(limit: float) -> None:
    label = patchy_label()
    image = np.dstack([label] * 3)
    crop = RandomCropWithCategoryLimit((40, 50), limit)
    fallbacks = 0
    for seed in range(150):
        np.random.seed(seed)
        transform = crop.get_transform(image, label)
        after = np.random.randint(1 << 30)
        np.random.seed(seed)
        for _ in range(10):
            y, x = np.random.randint(120 - 40 + 1), np.random.randint(160 - 50 + 1)
            if limit == 1.0 or has_variety(label[y : y + 40, x : x + 50], limit):
                break
        else:
            fallbacks += 1
        assert (transform.y0, transform.x0, transform.h, transform.w) == (y, x, 40, 50)
        assert np.random.randint(1 << 30) == after  # as many draws, no more
    assert (fallbacks == 0) == (limit == 1.0)


def counted_crops(label: np.ndarray, limit: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many places a 8x8 crop of ``label`` tries."""
    draws: list[int] = []
    original = np.random.randint

    def randint(high: int) -> int:
        draws.append(high)
        return original(high)

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "randint", randint)
        crop = RandomCropWithCategoryLimit((8, 8), limit)
        transform = crop.get_transform(np.dstack([label] * 3), label)
    assert transform.apply_segmentation(label).shape == (8, 8)
    return len(draws) // 2


def test_ten_draws_and_then_the_crop_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    one_class = np.full((16, 16), 7, np.uint8)
    assert counted_crops(one_class, 0.75, monkeypatch) == 10
    assert counted_crops(one_class, 0.999, monkeypatch) == 10
    assert counted_crops(one_class, 1.0, monkeypatch) == 1
    all_ignored = np.full((16, 16), 255, np.uint8)
    assert counted_crops(all_ignored, 0.75, monkeypatch) == 10


def test_ignored_pixels_are_neither_class_nor_area(monkeypatch: pytest.MonkeyPatch) -> None:
    checkered = np.indices((16, 16)).sum(0) % 2
    class_and_ignored = np.where(checkered, 7, 255).astype(np.uint8)
    assert counted_crops(class_and_ignored, 0.75, monkeypatch) == 10
    # Of the valid quarter of each crop, half is class 1 and half is class 2.
    valid = np.full((16, 16), 255, np.uint8)
    valid[::4], valid[2::4] = np.where(np.arange(16) % 2, 1, 2), 255
    assert counted_crops(valid, 0.51, monkeypatch) == 1
    assert counted_crops(valid, 0.5, monkeypatch) == 10  # "less than" the limit


@pytest.mark.parametrize("size", [(30, 200), (200, 30), (200, 200), (1, 1)])
def test_crop_of_a_smaller_image(size: tuple[int, int]) -> None:
    label = noise(60, 80, high=3)
    transform = RandomCropWithCategoryLimit(size, 0.75).get_transform(np.dstack([label] * 3), label)
    cropped = transform.apply_segmentation(label)
    assert cropped.shape == (min(60, size[0]), min(80, size[1]))


def test_every_crop_position_is_possible() -> None:
    np.random.seed(0)
    label = np.zeros((4, 5), np.uint8)
    crop = RandomCropWithCategoryLimit((2, 3))
    transforms = [crop.get_transform(np.dstack([label] * 3), label) for _ in range(300)]
    positions = {(int(transform.y0), int(transform.x0)) for transform in transforms}
    assert positions == {(y, x) for y in range(3) for x in range(3)}


@pytest.mark.parametrize(
    ("size", "limit", "message"),
    [
        ((512,), 1.0, "crop size"),
        ((0.9, 0.9), 1.0, "whole pixels"),
        ((0, 5), 1.0, "crop size"),
        ((5, 5), 0.0, "category limit"),
        ((5, 5), 1.5, "category limit"),
    ],
)
def test_crop_refuses(size: tuple, limit: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomCropWithCategoryLimit(size, limit)


def test_image_and_label_stay_aligned_through_crop_and_flip() -> None:
    label = noise(60, 80, high=11)
    augmentations = T.AugmentationList(
        [RandomCropWithCategoryLimit((32, 48), 0.75), T.RandomFlip(prob=0.5)]
    )
    flips = 0
    for seed in range(40):
        np.random.seed(seed)
        inputs = T.AugInput(np.dstack([label] * 3), sem_seg=label)
        transforms = augmentations(inputs)
        assert inputs.sem_seg.shape == (32, 48)
        assert np.array_equal(inputs.image, np.dstack([inputs.sem_seg] * 3))
        crop = transforms.transforms[0]
        window = label[crop.y0 : crop.y0 + 32, crop.x0 : crop.x0 + 48]
        flipped = np.array_equal(inputs.sem_seg, window[:, ::-1])
        assert flipped or np.array_equal(inputs.sem_seg, window)
        flips += flipped
    assert 10 < flips < 30


# ---- padding ----


@pytest.mark.parametrize("size", [(40, 60), (20, 60), (40, 30)])
def test_padding_is_exactly_zero_after_normalising(size: tuple[int, int]) -> None:
    image, label = noise(*size, 3), noise(*size, high=11)
    transform = PadToSize((40, 60), PIXEL_MEAN).get_transform(image)
    padded, padded_label = transform.apply_image(image), transform.apply_segmentation(label)
    height, width = size
    assert np.array_equal(padded[:height, :width], image)
    assert np.array_equal(padded_label[:height, :width], label)
    assert padded_label.dtype == np.uint8
    assert padded_label.shape == padded.shape[:2] == (40, 60)
    outside = np.ones((40, 60), bool)
    outside[:height, :width] = False
    assert (padded_label[outside] == 255).all()

    mean = torch.tensor(PIXEL_MEAN).view(-1, 1, 1)
    std = torch.tensor(PIXEL_STD).view(-1, 1, 1)
    normalised = ((torch.from_numpy(padded.transpose(2, 0, 1).copy()) - mean) / std).numpy()
    assert normalised.dtype == np.float32
    assert (normalised[:, outside] == 0).all()
    unpadded = ((torch.from_numpy(image.transpose(2, 0, 1).copy()) - mean) / std).numpy()
    assert np.array_equal(normalised[:, :height, :width], unpadded)
    if size == (40, 60):
        assert padded is image
    else:
        assert transform.inverse().apply_image(padded).shape == image.shape


def test_a_padded_image_is_stored_as_the_model_takes_it() -> None:
    padded = PadToSize((40, 60), PIXEL_MEAN).get_transform(noise(20, 30, 3))
    image = padded.apply_image(noise(20, 30, 3))
    assert np.shares_memory(planes(image), image)


def test_padding_never_cuts() -> None:
    image = noise(50, 20, 3)
    padded = PadToSize((40, 60), PIXEL_MEAN).get_transform(image).apply_image(image)
    assert padded.shape == (50, 60, 3)
    assert padded.dtype == np.float32


# ---- all of them ----


@pytest.mark.parametrize(
    "augmentation",
    [
        ResizeByScale((64, 32), (0.5, 2.0), "range"),
        RandomCropWithCategoryLimit((20, 20), 0.75),
        T.RandomFlip(prob=0.5),
        PhotometricDistortion(),
        PadToSize((90, 90), PIXEL_MEAN),
    ],
    ids=lambda augmentation: type(augmentation).__name__,
)
def test_pickled_and_seeded_augmentations_repeat(augmentation: T.Augmentation) -> None:
    label = noise(60, 80, high=11)
    image = noise(60, 80, 3)

    def run(augmentation: T.Augmentation) -> tuple[np.ndarray, np.ndarray]:
        inputs = T.AugInput(image, sem_seg=label)
        np.random.seed(3)
        pickle.loads(pickle.dumps(augmentation(inputs)))
        return inputs.image, inputs.sem_seg

    first = run(augmentation)
    second = run(pickle.loads(pickle.dumps(augmentation)))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
