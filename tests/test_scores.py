"""Scores in stripes equal the whole tensor, computed plainly in one piece."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largest import Largest
from semask.data import SemSegMapper
from semask.inference.model_outputs import for_evaluators
from semask.modeling import semantic_scores
from semask.ops import stripes
from semask.ops.apply import apply_fast_paths
from semask.ops.lazy_scores import LazyScores, lazy
from semask.ops.streamed import (
    StreamedMultiScale,
    StreamedSlidingWindow,
    StreamedWholeImage,
    score_rows,
)
from semask.ops.stripes import MapRows, Rows, resized
from tiny_model import build_tiny_model, config, photograph, tensor

# (height, width) of the logits, of the input and of the original image: whole factors, one
# resizing, odd sizes, none at all, smaller ones, single rows and columns.
SIZES = [
    ((8, 10), (32, 40), (32, 40)),
    ((8, 10), (32, 40), (50, 61)),
    ((7, 9), (25, 33), (49, 17)),
    ((7, 9), (7, 9), (7, 9)),
    ((12, 9), (45, 33), (5, 4)),
    ((1, 1), (3, 1), (2, 7)),
]
Sizes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def whole_image(sizes: Sizes, classes: int) -> tuple[LazyScores, Tensor]:
    """The two forms."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(classes, *sizes[0], dtype=torch.float64)
    plain = bilinear(bilinear(logits[None], sizes[1]), sizes[2])[0]
    return LazyScores(resized(MapRows(logits), *sizes[1:]), "logits"), plain


@pytest.fixture(params=[1, 700, 10**9], ids=["one row", "some rows", "all rows"])
def stripe_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(stripes.STRIPE_BYTES, "cpu", request.param)
    return int(request.param)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("classes", [1, 2, 11])
def test_whole_image(sizes: Sizes, classes: int, stripe_bytes: int) -> None:
    scores, plain = whole_image(sizes, classes)
    assert (scores.num_classes, *scores.size) == plain.shape
    torch.testing.assert_close(scores.full(), plain, rtol=0, atol=1e-12)
    assert torch.equal(scores.labels(), plain.argmax(dim=0))
    probabilities = plain.softmax(dim=0)
    torch.testing.assert_close(scores.probabilities(), probabilities, rtol=0, atol=1e-12)
    labels, confidence = scores.labels_and_confidence()
    assert torch.equal(labels, plain.argmax(dim=0))
    assert confidence.dtype == torch.float32
    torch.testing.assert_close(confidence.double(), probabilities.amax(dim=0), rtol=0, atol=1e-6)


def test_stripes_follow_each_other(stripe_bytes: int) -> None:
    scores, plain = whole_image(SIZES[1], 3)
    found = list(scores.stripes())
    assert [rows.start for rows, _ in found] == [0, *(rows.stop for rows, _ in found[:-1])]
    assert found[-1][0].stop == scores.size[0]
    assert len(found) == {1: 50, 700: 50, 10**9: 1}[stripe_bytes]
    together = torch.cat([part for _, part in found]).permute(2, 0, 1)
    torch.testing.assert_close(together, plain, rtol=0, atol=1e-12)


def at_stride_four(image: Tensor) -> Tensor:
    """Logits without parameters, in float64, that depend on the place in the input."""
    shape = (-(-image.shape[-2] // 4), -(-image.shape[-1] // 4))
    batch = image.double()[None] / 32
    maps = F.adaptive_avg_pool2d(batch, shape) + F.adaptive_max_pool2d(batch, shape).roll(1, 1)
    return maps * torch.linspace(0.5, 1.5, shape[1], dtype=torch.float64)


def rows_at_stride_four(image: Tensor) -> Rows:
    return score_rows({"logits": at_stride_four(image)}, (image.shape[-2], image.shape[-1]))


def plain_multi_scale(images: list[Tensor], size: tuple[int, int]) -> Tensor:
    views = []
    for image in images:
        shape = (image.shape[-2], image.shape[-1])
        for mirrored in (False, True):
            logits = at_stride_four(image.flip(-1) if mirrored else image)
            view = bilinear(bilinear(logits, shape), size)[0].softmax(dim=0)
            views.append(view.flip(-1) if mirrored else view)
    return torch.stack(views).mean(dim=0)


def plain_windows(image: Tensor, crop: int, starts: list[list[int]]) -> Tensor:
    total, count = (torch.zeros(3, *image.shape[1:], dtype=torch.float64) for _ in range(2))
    for top in starts[0]:
        for left in starts[1]:
            window = image[:, top : top + crop, left : left + crop]
            shape = (window.shape[-2], window.shape[-1])
            total[:, top : top + crop, left : left + crop] += bilinear(
                at_stride_four(window), shape
            )[0]
            count[:, top : top + crop, left : left + crop] += 1
    return total / count


@pytest.mark.parametrize("size", [(21, 30), (40, 53), (13, 8)])
def test_multi_scale(size: tuple[int, int], stripe_bytes: int) -> None:
    images = [tensor(photograph(21, 30)), tensor(photograph(11, 15)), tensor(photograph(37, 50))]
    scores = StreamedMultiScale()(rows_at_stride_four, {"images": images}, size, "logits")
    plain = plain_multi_scale(images, size)
    assert scores.kind == "probabilities"
    torch.testing.assert_close(scores.full(), plain, rtol=0, atol=1e-12)
    assert torch.equal(scores.labels(), plain.argmax(dim=0))
    confidence = scores.labels_and_confidence()[1]
    torch.testing.assert_close(confidence.double(), plain.amax(dim=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(21, 30), (40, 53), (13, 8)])
def test_sliding_window(size: tuple[int, int], stripe_bytes: int) -> None:
    image = tensor(photograph(21, 30))
    protocol = StreamedSlidingWindow(crop=(9, 9), stride=(6, 7))
    scores = protocol(rows_at_stride_four, {"image": image}, size, "logits")
    average = plain_windows(image, 9, [[0, 6, 12], [0, 7, 14, 21]])
    plain = bilinear(average[None], size)[0]
    torch.testing.assert_close(scores.full(), plain, rtol=0, atol=1e-12)
    assert torch.equal(scores.labels(), plain.argmax(dim=0))


def test_half_precision_is_resized_in_float32_and_returned_as_it_came() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 8, 9).bfloat16()
    scores = LazyScores(resized(MapRows(logits), (30, 33)), "logits")
    plain = bilinear(logits.float()[None], (30, 33))[0]
    assert scores.full().dtype == torch.bfloat16
    torch.testing.assert_close(scores.full().float(), plain, rtol=0, atol=2e-2)
    assert torch.equal(scores.labels(), plain.argmax(dim=0))


def test_gradients_pass_through(stripe_bytes: int) -> None:
    """For users who differentiate the scores of a model in evaluation mode."""
    logits = torch.randn(3, 7, 9, dtype=torch.float64, requires_grad=True)
    full = LazyScores(resized(MapRows(logits), (25, 33), (20, 40)), "logits").full()
    plain = bilinear(bilinear(logits[None], (25, 33)), (20, 40))[0]
    weight = torch.randn_like(plain)
    pair = [torch.autograd.grad((scores * weight).sum(), logits)[0] for scores in (full, plain)]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-12)


def test_what_a_tensor_holds_is_said() -> None:
    logits = 4 * torch.randn(6, 130, 20)
    probabilities = logits.softmax(dim=0)
    pair = lazy(logits, "logits"), lazy(probabilities, "probabilities")
    for scores in pair:
        labels, confidence = scores.labels_and_confidence()
        assert torch.equal(labels, logits.argmax(dim=0))
        torch.testing.assert_close(confidence, probabilities.amax(dim=0), rtol=0, atol=1e-6)
    assert lazy(pair[0], "scores") is pair[0]
    assert torch.equal(pair[0].full(), logits)
    assert lazy(logits.half(), "logits").labels_and_confidence()[1].dtype == torch.float32
    same = lazy(torch.full((4, 3, 3), 1e30), "logits").labels_and_confidence()[1]
    assert torch.allclose(same, torch.tensor(0.25))
    # Logits whose first row happens to add up to 1, as probabilities do, are logits all the same.
    logits[:, 0] = probabilities[:, 0]
    confidence = lazy(logits, "logits").labels_and_confidence()[1]
    torch.testing.assert_close(confidence, logits.softmax(dim=0).amax(dim=0))


@pytest.mark.parametrize("size", [(32, 40), (25, 33)])
def test_mask_classification(size: tuple[int, int], stripe_bytes: int) -> None:
    torch.manual_seed(0)
    prediction = {
        "pred_logits": torch.randn(1, 7, 4, dtype=torch.float64),
        "pred_masks": 3 * torch.randn(1, 7, 8, 10, dtype=torch.float64),
    }
    plain = semantic_scores(prediction, size)[0]
    assert plain.shape == (3, *size)
    scores = LazyScores(score_rows(prediction, size), "scores")
    torch.testing.assert_close(scores.full(), plain, rtol=0, atol=1e-12)
    labels, confidence = scores.labels_and_confidence()
    assert torch.equal(labels, plain.argmax(dim=0))
    expected = plain.amax(dim=0) / plain.sum(dim=0)
    torch.testing.assert_close(confidence.double(), expected, rtol=0, atol=1e-6)
    total = scores.probabilities().sum(dim=0)
    torch.testing.assert_close(total, torch.ones_like(total))


# ---- memory


Streamed = StreamedWholeImage | StreamedMultiScale | StreamedSlidingWindow
PROTOCOLS: list[Callable[[], Streamed]] = [
    StreamedWholeImage,
    StreamedMultiScale,
    lambda: StreamedSlidingWindow(crop=(16, 16), stride=(8, 8)),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [(64, 80), (90, 100)])
def test_labels_hold_no_tensor_of_all_scores(
    monkeypatch: pytest.MonkeyPatch, protocol: Callable[[], Streamed], size: tuple[int, int]
) -> None:
    monkeypatch.setitem(stripes.STRIPE_BYTES, "cpu", 1)
    image = tensor(photograph(64, 80))

    def network(window: Tensor) -> Rows:
        logits = at_stride_four(window).float().repeat(1, 100, 1, 1)
        return score_rows({"logits": logits}, (window.shape[-2], window.shape[-1]))

    with Largest() as largest:
        inputs = {"image": image, "images": [image]}
        scores = protocol()(network, inputs, size, "logits")
        scores.labels_and_confidence()
    assert largest.values < 300 * size[0] * size[1] // 10
    with Largest() as largest:
        scores.full()
    assert largest.values == 300 * size[0] * size[1]


# ---- what a model offers


PROTOCOL_KEYS: list[dict[str, Any]] = [
    {},
    {"PROTOCOL": "multi_scale", "MULTI_SCALE_FACTORS": [0.5, 1.25]},
    {"PROTOCOL": "slide", "SLIDE_CROP": [16, 16], "SLIDE_STRIDE": [12, 12]},
]


@pytest.mark.parametrize("priors", [False, True])
@pytest.mark.parametrize("keys", PROTOCOL_KEYS, ids=lambda keys: keys.get("PROTOCOL", "whole"))
def test_the_streamed_model_equals_the_plain_one(
    tmp_path: Path, priors: bool, keys: dict[str, Any]
) -> None:
    cfg = config(tmp_path, **keys)
    plain, streamed = build_tiny_model(cfg), build_tiny_model(cfg)
    apply_fast_paths(streamed, ["streamed"])
    mapper = SemSegMapper(cfg, is_train=False)
    inputs = [
        {**mapper.transform(photograph(21, 30)), "height": 33, "width": 40},
        mapper.transform(photograph(24, 24)),
    ]
    assert plain.score_kind == streamed.score_kind
    with torch.no_grad():
        pairs = zip(
            plain.inference(inputs, return_priors=priors),
            streamed.inference(inputs, return_priors=priors),
            strict=True,
        )
        for index, (expected, output) in enumerate(pairs):
            assert set(output) == set(expected)
            on_demand = streamed.predict(inputs[index], return_priors=priors)
            for key in {"sem_seg", "prior"} & set(expected):
                assert isinstance(on_demand[key], LazyScores)
                torch.testing.assert_close(output[key], expected[key], rtol=0, atol=1e-5)
                assert torch.equal(on_demand[key].full(), output[key])
                assert torch.equal(on_demand[key].labels(), output[key].argmax(dim=0))


@pytest.mark.parametrize("names", [[], ["streamed"]], ids=["plain", "streamed"])
def test_evaluators_get_what_they_read(tmp_path: Path, names: list[str]) -> None:
    model = apply_fast_paths(build_tiny_model(config(tmp_path)), names)
    inputs = [{"image": tensor(photograph(21, 30))}]
    wrapped = for_evaluators(model)
    assert not wrapped.training
    with torch.no_grad():
        (answer,) = wrapped(inputs)
        (expected,) = model(inputs)
    assert list(answer) == ["scores"]
    assert torch.equal(answer["sem_seg"], expected["sem_seg"])
    assert torch.equal(answer["scores"].full(), expected["sem_seg"])
    with pytest.raises(KeyError, match="instances"):
        answer["instances"]
    stock = torch.nn.Identity()
    assert for_evaluators(stock) is stock
