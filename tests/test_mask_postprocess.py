"""Semantic, instance and panoptic predictions from queries, against the reference's numbers."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import Tensor, nn

from semask.modeling.layers.resize import resize
from semask.modeling.mask_decoder.postprocess import (
    PanopticRule,
    class_scores,
    crop_and_resize,
    instance_prediction,
    mask_boxes,
    panoptic_prediction,
    select_instances,
    strongest_queries,
)
from semask.ops.apply import apply_fast_paths
from semask.ops.lazy_scores import LazyScores
from semask.ops.mask_postprocess import (
    EncodedMasks,
    MaskSizes,
    class_score_rows,
    encode_mask,
    encoded_instances,
    striped_panoptic,
)
from semask.ops.stripes import STRIPE_BYTES
from tiny_masks import config

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


@pytest.mark.parametrize("name", INSTANCE_CASES)
def test_the_strongest_queries_are_instances_of_their_most_probable_class(name: str) -> None:
    case = Case(name)
    found = strongest_queries(case.logits, case.masks, top=5)
    pairs = instance_prediction(case.logits, case.masks, top=10**6)
    of_pair = {
        (query, category): (score, mask)
        for query, category, score, mask in zip(
            *(pairs.queries.tolist(), pairs.classes.tolist(), pairs.scores.tolist(), pairs.masks),
            strict=True,
        )
    }
    best = [max(s for (q, _), (s, _) in of_pair.items() if q == k) for k in range(len(case.logits))]
    assert found.scores.tolist() == pytest.approx(sorted(best, reverse=True)[:5])
    assert found.num_classes == case.logits.shape[1] - 1
    for query, category, score, mask in zip(
        *(found.queries.tolist(), found.classes.tolist(), found.scores.tolist(), found.masks),
        strict=True,
    ):
        assert of_pair[query, category][0] == pytest.approx(score)
        assert torch.equal(mask > 0.5, of_pair[query, category][1])


def test_a_query_with_an_empty_mask_says_nothing() -> None:
    masks = torch.full((2, 4, 5), -1.0)
    masks[1, 0, 0] = 2.0
    found = strongest_queries(torch.zeros(2, 3), masks, top=100)
    assert found.queries.tolist() == [1]


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


# ---- the forms without full-resolution masks ----


def sizes_of(case: Case) -> MaskSizes:
    padded, image, output = (
        (size[0], size[1]) for size in (case.padded_size, case.image_size, case.output_size)
    )
    return MaskSizes(padded=padded, image=image, output=output)


@pytest.mark.parametrize("resize_masks", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_striped_scores_equal_plain(
    name: str, resize_masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRIPE_BYTES, "cpu", 100_000)  # some stripes for each image
    case = Case(name)
    rows = class_score_rows(case.logits, case.masks, sizes_of(case), resize_masks=resize_masks)
    if resize_masks:
        want = class_scores(case.logits, case.output_masks())
    else:
        want = class_scores(case.logits, case.padded_masks())
        want = crop_and_resize(want, case.image_size, case.output_size)
    scores = LazyScores(rows, "scores")
    assert len(list(scores.stripes())) > 1
    torch.testing.assert_close(scores.full(), want, rtol=1e-9, atol=1e-9)
    assert torch.equal(scores.labels(), want.argmax(dim=0))


@pytest.mark.parametrize("name", INSTANCE_CASES)
def test_encoded_instances_equal_plain(name: str) -> None:
    case = Case(name)
    top = case.settings["detections_per_image"]
    want = instance_prediction(case.logits, case.output_masks(), top=top, things=case.things)
    got = encoded_instances(case.logits, case.masks, sizes_of(case), top=top, things=case.things)
    assert torch.equal(got.queries, want.queries)
    assert torch.equal(got.classes, want.classes)
    assert torch.equal(torch.stack(list(got.masks)), want.masks)
    assert torch.equal(got.boxes, want.boxes)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inside_only", [True, False])
@pytest.mark.parametrize("name", PANOPTIC_CASES)
def test_striped_segments_equal_plain(
    name: str, inside_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRIPE_BYTES, "cpu", 100_000)
    case = Case(name)
    rule = dataclasses.replace(case.rule, inside_only=inside_only)
    want, want_segments = panoptic_prediction(case.logits, case.output_masks(), rule)
    got, segments = striped_panoptic(case.logits, case.masks, sizes_of(case), rule)
    assert want_segments
    assert segments == want_segments
    assert got.dtype == torch.int32
    assert torch.equal(got, want)


def test_encoded_masks_are_chosen_as_a_tensor_is() -> None:
    masks = torch.rand(4, 5, 6) > 0.5
    encoded = EncodedMasks([encode_mask(mask) for mask in masks])
    assert torch.equal(encoded[2], masks[2])
    for item in (slice(1, 3), torch.tensor([3, 0]), torch.tensor([True, False, False, True])):
        assert torch.equal(torch.stack(list(encoded[item])), masks[item])


# ---- whole models, whose head is replaced ----


class ConstantHead(nn.Module):
    """Gives the decoder's output of a case, whatever the features."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"pred_logits": self.case.logits[None], "pred_masks": self.case.masks[None]}


def model_of(case: Case, decoder: str, before: bool) -> Any:
    """As a config gives it, but for the head."""
    settings, name = case.settings, "tiny_postprocess"
    things = {i: i for i in settings["thing_classes"]}
    MetadataCatalog.get(name).set(thing_dataset_id_to_contiguous_id=things)
    test = {
        "SEMANTIC_ON": settings["semantic_on"],
        "INSTANCE_ON": settings["instance_on"],
        "PANOPTIC_ON": settings["panoptic_on"],
        "OBJECT_MASK_THRESHOLD": settings["object_mask_threshold"],
        "OVERLAP_THRESHOLD": settings["overlap_threshold"],
        "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": before,
    }
    cfg = config(decoder, **{f"MASK_FORMER__TEST__{key}": value for key, value in test.items()})
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = settings["num_classes"]
    cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = settings["size_divisibility"]
    cfg.TEST.DETECTIONS_PER_IMAGE = settings["detections_per_image"]
    cfg.DATASETS.TEST = (name,)
    model = build_model(cfg).double().eval()
    model.sem_seg_head = ConstantHead(case)
    return model


def plain_segments(case: Case, inside_only: bool) -> tuple[np.ndarray, list[list[int]]]:
    """The rule of both papers' codes in NumPy: ids, and rows (id, class, is a thing)."""
    masks = 1 / (1 + np.exp(-case.output_masks().numpy()))
    exponents = np.exp(case.logits.numpy())
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    classes, scores = probabilities.argmax(axis=1), probabilities.max(axis=1)
    settings = case.settings
    seen = classes < settings["num_classes"]
    (kept,) = np.nonzero(seen & (scores > settings["object_mask_threshold"]))
    owner = kept[(scores[kept, None, None] * masks[kept]).argmax(axis=0)]
    ids, rows = np.zeros(owner.shape, np.int32), list[list[int]]()
    stuff: dict[int, int] = {}
    for query in kept:
        own, inside = owner == query, masks[query] >= 0.5
        pixels = own & inside if inside_only else own
        if not (own.any() and inside.any() and pixels.any()):
            continue
        if own.sum() / inside.sum() < settings["overlap_threshold"]:
            continue
        category = int(classes[query])
        is_thing = category in settings["thing_classes"]
        if category in stuff:
            ids[pixels] = stuff[category]
            continue
        rows.append([len(rows) + 1, category, int(is_thing)])
        ids[pixels] = len(rows)
        if not is_thing:
            stuff[category] = len(rows)
    return ids, rows


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "streamed"])
@pytest.mark.parametrize(
    ("name", "decoder", "before"),
    [
        *(("semantic_only", "mask2former", before) for before in (False, True)),
        ("instance_only", "mask2former", False),
        *(("panoptic_a", "mask2former", before) for before in (False, True)),
        ("panoptic_a", "maskformer", False),
        ("panoptic_low_thresholds", "mask2former", False),
        ("panoptic_low_thresholds", "maskformer", True),
    ],
)
def test_whole_models_with_another_head(
    name: str, decoder: str, before: bool, form: str, catalogs: None
) -> None:
    case = Case(name)
    want, settings = case.expected, case.settings
    model = model_of(case, decoder, before)
    if form == "streamed":
        model = apply_fast_paths(model, [form])
    height, width = case.output_size
    image = torch.zeros(3, *case.image_size, dtype=torch.float64)
    (output,) = model([{"image": image, "height": height, "width": width}])
    asked = {
        *(["sem_seg"] if settings["semantic_on"] else []),
        *(["instances"] if settings["instance_on"] else []),
        *(["panoptic_seg"] if settings["panoptic_on"] else []),
    }
    assert set(output) == asked
    if settings["semantic_on"]:
        scores = output["sem_seg"].numpy()
        if before and not settings["instance_on"]:  # not among the reference's cases
            probable = case.output_masks().sigmoid()
            of_classes = case.logits.softmax(dim=1)[:, :-1]
            plain = torch.einsum("qc,qhw->chw", of_classes, probable)
            np.testing.assert_allclose(scores, plain, rtol=1e-6, atol=1e-6)
            assert abs(scores[:, ::7, ::11] - want["sem_seg_grid"]).max() > 1e-3
        else:
            np.testing.assert_array_equal(scores.argmax(axis=0), want["sem_seg_argmax"])
            np.testing.assert_allclose(
                scores[:, ::7, ::11], want["sem_seg_grid"], rtol=1e-6, atol=1e-6
            )
    if settings["instance_on"]:
        found = output["instances"]
        order = np.lexsort((found.pred_classes.numpy(), -found.scores.numpy()))
        np.testing.assert_array_equal(found.pred_classes[order], want["classes"])
        np.testing.assert_allclose(found.scores[order], want["scores"], rtol=1e-6, atol=1e-6)
        masks = np.packbits(found.pred_masks[order].flatten(1).numpy(), axis=1)
        np.testing.assert_array_equal(masks.ravel(), want["masks"].ravel())
    if settings["panoptic_on"]:
        ids, segments = output["panoptic_seg"]
        rows = [[s["id"], s["category_id"], int(s["isthing"])] for s in segments]
        expected, expected_rows = plain_segments(case, decoder != "maskformer")
        np.testing.assert_array_equal(ids, expected)
        assert rows == expected_rows
        if decoder != "maskformer":
            np.testing.assert_array_equal(ids, want["panoptic"])
            np.testing.assert_array_equal(rows, want["segments"])


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak"
)
@pytest.mark.slow
def test_a_street_at_full_size_fits_into_memory() -> None:
    """2048 x 4096 pixels, 150 classes and 100 queries within 3.5 GiB, all that the process has.

    The labels of some rows are those of the plain form but where two scores are as good as equal.
    """
    result = subprocess.run(
        [sys.executable, "-c", FULL_SIZE], capture_output=True, text=True, check=True
    )
    peak, classes, compared, different = map(int, result.stdout.split())
    assert peak < 3.5 * 2**20  # KiB
    assert classes > 10
    assert compared > 0.99 * 56 * 4096
    assert different == 0


FULL_SIZE = """
import re
from pathlib import Path
import torch
import semask
from semask.modeling.layers.resize import resize
from semask.modeling.mask_decoder.postprocess import class_scores
from semask.ops.mask_postprocess import MaskSizes, class_score_rows, encoded_instances
from semask.ops.lazy_scores import LazyScores

torch.manual_seed(0)
size = (2048, 4096)
sizes = MaskSizes(padded=size, image=size, output=size)
logits, masks = 3 * torch.randn(100, 151), 2 * torch.randn(100, 512, 1024)
with torch.no_grad():
    labels = LazyScores(class_score_rows(logits, masks, sizes), "scores").labels()
    instances = encoded_instances(logits, masks, sizes, top=20)
    # Rows 992 to 1056 of the plain form; the outer ones have no neighbours here.
    scores = class_scores(logits, resize(masks[None, :, 248:264], (64, size[1]))[0])
    best = scores[:, 4:-4].topk(2, dim=0)
clear = best.values[0] - best.values[1] > 1e-5
different = (labels[996:1052] != best.indices[0]) & clear
assert labels.shape == size and len(instances.masks) == 20
# Not getrusage's figure, which counts what the parent held when it started this process.
peak = re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)
print(peak, len(labels.unique()), int(clear.sum()), int(different.sum()))
"""
