"""Scores in stripes equal the whole tensor, computed plainly in one piece."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largest import Largest
from semask.inference.predicting import for_evaluators
from semask.modeling import MultiScale, SlidingWindow, WholeImage
from semask.modeling.meta_arch.protocol import TestProtocol
from semask.ops import stripes
from semask.ops.scores import Scores
from semask.ops.stripes import MapRows, resized
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


def whole_image(sizes: Sizes, classes: int) -> tuple[Scores, Tensor]:
    """The two forms."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(classes, *sizes[0], dtype=torch.float64)
    plain = bilinear(bilinear(logits[None], sizes[1]), sizes[2])[0]
    return Scores(resized(MapRows(logits), *sizes[1:])), plain


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
    scores = MultiScale()(at_stride_four, {"images": images}, size)
    plain = plain_multi_scale(images, size)
    assert scores.are_probabilities
    torch.testing.assert_close(scores.full(), plain, rtol=0, atol=1e-12)
    assert torch.equal(scores.labels(), plain.argmax(dim=0))
    confidence = scores.labels_and_confidence()[1]
    torch.testing.assert_close(confidence.double(), plain.amax(dim=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(21, 30), (40, 53), (13, 8)])
def test_sliding_window(size: tuple[int, int], stripe_bytes: int) -> None:
    image = tensor(photograph(21, 30))
    protocol = SlidingWindow(crop=(9, 9), stride=(6, 7))
    scores = protocol(at_stride_four, {"image": image}, size)
    average = plain_windows(image, 9, [[0, 6, 12], [0, 7, 14, 21]])
    plain = bilinear(average[None], size)[0]
    torch.testing.assert_close(scores.full(), plain, rtol=0, atol=1e-12)
    assert torch.equal(scores.labels(), plain.argmax(dim=0))


def test_half_precision_is_resized_in_float32_and_returned_as_it_came() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 8, 9).bfloat16()
    scores = Scores(resized(MapRows(logits), (30, 33)))
    plain = bilinear(logits.float()[None], (30, 33))[0]
    assert scores.full().dtype == torch.bfloat16
    torch.testing.assert_close(scores.full().float(), plain, rtol=0, atol=2e-2)
    assert torch.equal(scores.labels(), plain.argmax(dim=0))


def test_gradients_pass_through(stripe_bytes: int) -> None:
    """For whoever asks a model in evaluation mode what its scores depend on."""
    logits = torch.randn(3, 7, 9, dtype=torch.float64, requires_grad=True)
    full = Scores(resized(MapRows(logits), (25, 33), (20, 40))).full()
    plain = bilinear(bilinear(logits[None], (25, 33)), (20, 40))[0]
    weight = torch.randn_like(plain)
    pair = [torch.autograd.grad((scores * weight).sum(), logits)[0] for scores in (full, plain)]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-12)


def test_scores_that_are_there_in_full() -> None:
    logits = 4 * torch.randn(6, 130, 20)
    probabilities = logits.softmax(dim=0)
    for given in (logits, probabilities):
        labels, confidence = Scores.of(given).labels_and_confidence()
        assert torch.equal(labels, given.argmax(dim=0))
        torch.testing.assert_close(confidence, probabilities.amax(dim=0), rtol=0, atol=1e-6)
    assert torch.equal(Scores.of(logits).full(), logits)
    assert Scores.of(logits.half()).labels_and_confidence()[1].dtype == torch.float32
    same = Scores.of(torch.full((4, 3, 3), 1e30)).labels_and_confidence()[1]
    assert torch.allclose(same, torch.tensor(0.25))


# ---- memory


PROTOCOLS: list[Callable[[], TestProtocol]] = [
    WholeImage,
    MultiScale,
    lambda: SlidingWindow(crop=(16, 16), stride=(8, 8)),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [(64, 80), (90, 100)])
def test_labels_hold_no_tensor_of_all_scores(
    monkeypatch: pytest.MonkeyPatch,
    protocol: Callable[[], TestProtocol],
    size: tuple[int, int],
) -> None:
    monkeypatch.setitem(stripes.STRIPE_BYTES, "cpu", 1)
    image = tensor(photograph(64, 80))

    def network(window: Tensor) -> Tensor:
        return at_stride_four(window).float().repeat(1, 100, 1, 1)

    with Largest() as largest:
        scores = protocol()(network, {"image": image, "images": [image]}, size)
        scores.labels_and_confidence()
    assert largest.values < 300 * size[0] * size[1] // 10
    with Largest() as largest:
        scores.full()
    assert largest.values == 300 * size[0] * size[1]


# ---- what a model offers


@pytest.mark.parametrize("priors", [False, True])
def test_model_gives_the_same_in_both_forms(tmp_path: Path, priors: bool) -> None:
    model = build_tiny_model(config(tmp_path))
    inputs = [
        {"image": tensor(photograph(21, 30)), "height": 33, "width": 40},
        {"image": tensor(photograph(24, 24))},
    ]
    with torch.no_grad():
        whole = model.inference(inputs, return_priors=priors)
        for output, lazy in zip(whole, model.scores(inputs, return_priors=priors), strict=True):
            assert set(lazy) == set(output)
            for key in {"sem_seg", "prior"} & set(output):
                assert torch.equal(lazy[key].full(), output[key])
                assert torch.equal(lazy[key].labels(), output[key].argmax(dim=0))


def test_evaluators_get_what_they_read(tmp_path: Path) -> None:
    model = build_tiny_model(config(tmp_path))
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
