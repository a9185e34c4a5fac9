"""What is made of queries: semantic, instance and panoptic, against the reference's numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from semask.modeling.layers.resize import resize
from semask.modeling.meta_arch.mask_postprocess import (
    PanopticRule,
    class_scores,
    crop_and_resize,
    instance_prediction,
    mask_boxes,
    panoptic_prediction,
    select_instances,
)

FIXTURES = Path(__file__).parent / "fixtures" / "mask_postprocess"
CASES = sorted(path.stem for path in FIXTURES.glob("*.json"))
INSTANCE_CASES = [name for name in CASES if name != "semantic_only"]
PANOPTIC_CASES = [name for name in CASES if name.startswith("panoptic")]


class Case:
    """Settings, the decoder's output in float64 and the results of the reference."""

    def __init__(self, name: str) -> None:
        self.settings: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
        with np.load(FIXTURES / f"{name}.npz") as arrays:
            self.expected = dict(arrays)
        self.logits = torch.from_numpy(self.expected["pred_logits"]).double()
        self.masks = torch.from_numpy(self.expected["pred_masks"]).double()
        self.image_size: list[int] = self.settings["image_size"]
        self.output_size: list[int] = self.settings["output_size"]
        self.padded_size = [-(-side // 32) * 32 for side in self.image_size]
        self.rule = PanopticRule(
            things=self.settings["thing_classes"],
            object_mask_threshold=self.settings["object_mask_threshold"],
            overlap_threshold=self.settings["overlap_threshold"],
        )
        self.things = self.settings["thing_classes"] if self.settings["panoptic_on"] else None

    def padded_masks(self) -> Tensor:
        return resize(self.masks[None], self.padded_size)[0]

    def output_masks(self) -> Tensor:
        return crop_and_resize(self.padded_masks(), self.image_size, self.output_size)

    def scores(self) -> Tensor:
        if self.settings["instance_on"] or self.settings["panoptic_on"]:
            return class_scores(self.logits, self.output_masks())
        scores = class_scores(self.logits, self.padded_masks())
        return crop_and_resize(scores, self.image_size, self.output_size)


@pytest.mark.parametrize("name", [name for name in CASES if name != "instance_only"])
def test_semantic_scores_equal_reference(name: str) -> None:
    case = Case(name)
    scores = case.scores().numpy()
    want = case.expected
    np.testing.assert_array_equal(scores.argmax(axis=0), want["sem_seg_argmax"])
    np.testing.assert_allclose(scores.sum(axis=(1, 2)), want["sem_seg_sum"], rtol=1e-6)
    np.testing.assert_allclose(scores[:, ::7, ::11], want["sem_seg_grid"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", INSTANCE_CASES)
def test_instances_equal_reference(name: str) -> None:
    case, want = Case(name), Case(name).expected
    found = instance_prediction(
        case.logits,
        case.output_masks(),
        top=case.settings["detections_per_image"],
        things=case.things,
    )
    order = np.lexsort((found.classes.numpy(), -found.scores.numpy()))
    np.testing.assert_allclose(found.scores[order], want["scores"], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.classes[order], want["classes"])
    masks = found.masks[order].flatten(1).numpy()
    np.testing.assert_array_equal(np.packbits(masks, axis=1).ravel(), want["masks"].ravel())


@pytest.mark.parametrize("name", PANOPTIC_CASES)
def test_panoptic_segments_equal_reference(name: str) -> None:
    case, want = Case(name), Case(name).expected
    ids, segments = panoptic_prediction(case.logits, case.output_masks(), case.rule)
    assert ids.dtype == torch.int32
    np.testing.assert_array_equal(ids, want["panoptic"])
    rows = [[s["id"], s["category_id"], int(s["isthing"])] for s in segments]
    np.testing.assert_array_equal(rows, want["segments"])


def test_boxes_enclose_the_masks() -> None:
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2:4, 1:7] = True
    masks[1, 5, 0] = True
    assert mask_boxes(masks).tolist() == [[1, 2, 7, 4], [0, 5, 1, 6], [0, 0, 0, 0]]


def test_fewer_pairs_than_asked_for_are_all_kept() -> None:
    queries, classes, _ = select_instances(torch.randn(3, 5), top=100)
    pairs = set(zip(queries.tolist(), classes.tolist(), strict=True))
    assert pairs == {(q, c) for q in range(3) for c in range(4)}


def test_nothing_seen_gives_no_segment() -> None:
    logits = torch.tensor([[0.0, 0.0, 9.0]])
    ids, segments = panoptic_prediction(logits, torch.ones(1, 4, 5), PanopticRule(things=[0]))
    assert ids.shape == (4, 5)
    assert not ids.any()
    assert segments == []


def test_pixels_outside_the_mask_belong_to_the_segment_in_maskformer_only() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0]])
    masks = torch.full((1, 2, 10), 3.0)
    masks[0, 0, 0] = -3.0
    inside, _ = panoptic_prediction(logits, masks, PanopticRule(things=[0]))
    everywhere, _ = panoptic_prediction(logits, masks, PanopticRule([0], inside_only=False))
    assert inside.tolist()[0][:2] == [0, 1]
    assert everywhere.min() == 1
