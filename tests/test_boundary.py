"""Boundary IoU against the paper's definition, taken word for word."""

import math

import cv2
import numpy as np
import pytest
import torch

from semask.evaluation import BoundaryIoU, EvaluatedImage, boundary_band, confusion_matrix
from semask.evaluation.boundary import band_width
from semask.ops.lazy_scores import lazy

IGNORE = 255
NAMES = ["sky", "wall", "road"]


def blobs(height: int, width: int, values: int, seed: int) -> np.ndarray:
    """Regions of several sizes with ragged contours."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, values, (height // 6 + 1, width // 6 + 1))
    classes = coarse.repeat(6, axis=0).repeat(6, axis=1)[:height, :width]
    noise = rng.random((height, width)) < 0.03
    return np.where(noise, rng.integers(0, values, (height, width)), classes)


def evaluated(prediction: np.ndarray, label: np.ndarray, classes: int = 3) -> EvaluatedImage:
    predicted, truth = torch.from_numpy(prediction).long(), torch.from_numpy(label).byte()
    return EvaluatedImage(
        record={"file_name": "a.jpg"},
        scores=lazy(
            torch.nn.functional.one_hot(predicted, classes).permute(2, 0, 1), "probabilities"
        ),
        prediction=predicted,
        label=truth,
        ignore_label=IGNORE,
        matrix=confusion_matrix(predicted, truth, classes, IGNORE),
    )


def metrics_of(*parts: BoundaryIoU) -> dict[str, float]:
    return dict(parts[0].evaluate([part.share() for part in parts]).metrics)


@pytest.mark.parametrize("distance", [1, 2, 5, 20])
def test_band_pixel_by_pixel(distance: int) -> None:
    classes = blobs(14, 17, 3, seed=distance)
    expected = np.zeros(classes.shape, dtype=bool)
    for row, column in np.ndindex(*classes.shape):
        for y in range(row - distance, row + distance + 1):
            for x in range(column - distance, column + distance + 1):
                inside = 0 <= y < classes.shape[0] and 0 <= x < classes.shape[1]
                if not inside or classes[y, x] != classes[row, column]:
                    expected[row, column] = True
    assert np.array_equal(boundary_band(torch.from_numpy(classes), distance).numpy(), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_thin_images_are_all_boundary(shape: tuple[int, int]) -> None:
    assert boundary_band(torch.zeros(shape, dtype=torch.int64), 1).all()


def test_width_of_the_band() -> None:
    assert band_width(300, 400) == 10  # 2 % of 500
    assert band_width(1024, 2048) == 46
    assert band_width(8, 8) == 1
    assert band_width(300, 400, ratio=0.005) == 2  # 2.5, to the even number


def mask_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """arXiv 2103.16562, section 4: the mask without what erosion leaves of it."""
    padded = np.pad(mask.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)
    return mask & ~eroded[1:-1, 1:-1].astype(bool)


def brute_force(images: list[tuple[np.ndarray, np.ndarray]], classes: int) -> list[float]:
    """The IoU of the classes' boundary pixels over all images, class by class."""
    result = []
    for index in range(classes):
        intersection = union = 0
        for prediction, label in images:
            distance = max(1, round(0.02 * math.hypot(*label.shape)))
            valid = label != IGNORE
            truth = mask_boundary((label == index) & valid, distance)
            predicted = mask_boundary((prediction == index) & valid, distance)
            intersection += int((truth & predicted).sum())
            union += int((truth | predicted).sum())
        result.append(100 * intersection / union if union else math.nan)
    return result


def random_images(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    images = []
    for seed in range(number):
        height, width = 70 + 31 * seed, 140 - 23 * seed
        label = blobs(height, width, 3, seed)
        prediction = np.where(
            np.random.default_rng(seed).random(label.shape) < 0.02,
            blobs(height, width, 3, seed + 50),
            np.roll(label, seed, axis=1),
        )
        label[:9, 5:30] = IGNORE
        images.append((prediction, label))
    return images


def test_equals_the_definition() -> None:
    images = random_images(4)
    part = BoundaryIoU(NAMES)
    for image in images:
        part.process(evaluated(*image))
    metrics = metrics_of(part)
    expected = brute_force(images, 3)
    assert [metrics[f"BoundaryIoU-{name}"] for name in NAMES] == pytest.approx(expected, rel=1e-12)
    assert metrics["mBoundaryIoU"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert 0 < metrics["mBoundaryIoU"] < 100


def test_shares_of_processes_add_up_exactly() -> None:
    images = random_images(5)
    alone, shares = BoundaryIoU(NAMES), [BoundaryIoU(NAMES) for _ in range(3)]
    for index, image in enumerate(images):
        alone.process(evaluated(*image))
        shares[index % 3].process(evaluated(*image))
    assert metrics_of(*shares) == metrics_of(*shares[::-1]) == metrics_of(alone)


def test_ignored_pixels_count_nowhere() -> None:
    label = np.zeros((40, 40), dtype=np.int64)
    label[:, 20:] = 1
    label[10:20] = IGNORE
    prediction = np.where(label == IGNORE, 2, label)  # wrong there alone
    part = BoundaryIoU(NAMES)
    part.process(evaluated(prediction, label))
    metrics = metrics_of(part)
    assert metrics["mBoundaryIoU"] == metrics["BoundaryIoU-sky"] == 100
    assert math.isnan(metrics["BoundaryIoU-road"])


def test_is_stricter_than_iou_for_large_regions() -> None:
    label = np.zeros((200, 200), dtype=np.int64)
    label[50:150, 50:150] = 1
    prediction = np.zeros_like(label)
    prediction[55:145, 55:145] = 1
    part = BoundaryIoU(NAMES)
    part.process(evaluated(prediction, label))
    wall = metrics_of(part)["BoundaryIoU-wall"]
    # Bands of 6 pixels, 5 apart from each other: one ring of 90 x 90 pixels is in both.
    ring, outer, inner = 90**2 - 88**2, 100**2 - 88**2, 90**2 - 78**2
    assert wall == pytest.approx(100 * ring / (outer + inner - ring))


def test_classes_without_ground_truth() -> None:
    part = BoundaryIoU(NAMES)
    prediction = np.zeros((20, 20), dtype=np.int64)
    prediction[:, 10:] = 1
    part.process(evaluated(prediction, np.zeros((20, 20), dtype=np.int64)))
    metrics = metrics_of(part)
    assert math.isnan(metrics["BoundaryIoU-wall"])  # only predicted: counts as 0 in the mean,
    assert math.isnan(metrics["BoundaryIoU-road"])  # nowhere: does not count
    assert metrics["mBoundaryIoU"] == pytest.approx(metrics["BoundaryIoU-sky"] / 2)


def test_nothing_seen_and_reset() -> None:
    part = BoundaryIoU(NAMES)
    part.process(evaluated(*random_images(1)[0]))
    part.reset()
    result = part.evaluate([part.share()])
    assert all(math.isnan(value) for value in result.metrics.values())
    assert result.document["boundary_iou"]["dilation_ratio"] == 0.02
