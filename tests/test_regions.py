"""What each pixel of a picture is, against the picture itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from semask.inference.prediction import ImagePrediction, InstancePrediction
from semask.inference.predictor import Predictor
from tiny_model import checkpoint, config, photograph


def instances(**values: Any) -> InstancePrediction:
    """A large instance under two small ones, the last of which is hardly one."""
    masks = np.zeros((3, 20, 40), bool)
    masks[0, 5:15, 20:35] = masks[1, :18, :30] = masks[2, 16:, 32:] = True
    boxes = [[20, 5, 35, 15], [0, 0, 30, 18], [32, 16, 40, 20]]
    given: dict[str, Any] = {
        "image": photograph(20, 40),
        "boxes": np.array(boxes, np.float32),
        "scores": np.array([0.9, 0.8, 0.2], np.float32),
        "classes": np.array([1, 0, 0]),
        "each_mask": masks,
        "class_names": ("sheep", "dog"),
        "category_ids": (3, 7),
        **values,
    }
    return InstancePrediction(**given)


def test_of_classes(tmp_path: Path) -> None:
    predictor = Predictor(config(tmp_path), checkpoint(tmp_path))
    image = photograph(30, 40)
    found = predictor.in_detail(image)
    plain = predictor(image, probabilities=True)
    regions = found.regions()
    assert set(regions) == set(found.pictures())
    shown = regions["overlay"]
    assert shown.names == predictor.class_names
    assert np.array_equal(shown.index, plain.labels)
    assert np.array_equal(shown.colors[shown.index], found.overlay(1))
    assert plain.probabilities is not None
    assert plain.confidence is None
    assert shown.confidence is not None
    assert np.allclose(shown.confidence, plain.probabilities.max(axis=0), atol=1e-6)
    assert shown.shares().sum() == pytest.approx(1)
    for name, share, certainty in zip(
        shown.names, shown.shares(), shown.certainties(), strict=True
    ):
        mask = plain.labels == shown.names.index(name)
        assert share == pytest.approx(mask.mean())
        assert np.isnan(certainty) if not share else certainty <= 1
        assert not share or certainty == pytest.approx(shown.confidence[mask].mean(), rel=1e-5)
    assert found.priors is not None
    for name, logits in found.priors.items():
        assert np.array_equal(regions[name].index, logits.argmax(axis=0))
        confidence = regions[name].confidence
        assert confidence is not None
        assert np.allclose(confidence, softmax(logits, axis=0).max(axis=0), atol=1e-6)


def test_of_instances() -> None:
    found = instances()
    shown = found.regions()["overlay"]
    assert shown.names == ("dog", "sheep")
    assert (shown.index[10, 25], shown.index[2, 2], shown.index[19, 39]) == (0, 1, -1)
    assert np.allclose(shown.certainties(), [0.9, 0.8])
    assert np.allclose(shown.shares(), [150 / 800, 440 / 800])
    without_texts = found.overlay(alpha=1, min_score=0.5)[16:18, 1:29]
    assert np.array_equal(without_texts, shown.colors[shown.index[16:18, 1:29]])
    assert len(found.regions(min_score=0.1)["overlay"].names) == 3
    assert found.regions(min_score=1)["overlay"].shares().size == 0


def test_of_boxes_alone() -> None:
    inner = np.array([[0, 0, 40, 20], [4, 4, 8, 8], [9, 9, 12, 12]], np.float32)
    shown = instances(each_mask=None, boxes=inner).regions()["overlay"]
    assert (shown.index[0, 0], shown.index[5, 5], shown.index[10, 10]) == (0, 1, 0)


def test_of_segments() -> None:
    panoptic = np.zeros((20, 40), np.int32)
    panoptic[2:10, :20], panoptic[10:18, :20], panoptic[:, 25:] = 4, 2, 9
    segments = (
        {"id": 2, "isthing": True, "category_id": 1, "score": 0.75},
        {"id": 4, "isthing": True, "category_id": 1, "score": 0.5},
        {"id": 9, "isthing": False, "category_id": 0},
    )
    stuff = {"stuff_names": ("grass",), "stuff_colors": np.array([[20, 200, 40]], np.uint8)}
    found = instances(panoptic=panoptic, segments=segments, **stuff)
    shown = found.regions()["overlay"]
    assert shown.names == ("dog", "dog", "grass")
    assert [shown.index[y, x] for y, x in ((12, 3), (3, 3), (3, 30), (3, 22))] == [0, 1, 2, -1]
    assert np.allclose(shown.certainties(), [0.75, 0.5, np.nan], equal_nan=True)
    picture = found.overlay(1)
    for y, x in ((17, 0), (2, 0), (0, 25)):  # contours, where no text is
        assert np.array_equal(picture[y, x], shown.colors[shown.index[y, x]])


def test_a_prediction_need_not_know() -> None:
    class Plain(ImagePrediction):
        image = photograph(2, 3)

        def pictures(self, *, alpha: float = 0.5, min_score: float = 0.5) -> dict[str, np.ndarray]:
            return {"overlay": self.image}

        def save(self, folder: str, name: str) -> None: ...

        def save_classes(self, folder: str) -> None: ...

    assert Plain().regions() == {}
    assert not Plain().has_scores
    assert instances().has_scores
