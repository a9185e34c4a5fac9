"""Whole image, multi-scale and sliding window, against plain computations of their own."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_net
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor

import tiny
from semask.config.loading import load_config
from semask.data import SemSegMapper
from semask.errors import ConfigError
from semask.modeling import MultiScale, SlidingWindow, WholeImage
from semask.modeling.meta_arch.protocol import window_starts
from tiny_model import build_tiny_model, config, photograph, tensor

CLASSES = 3


def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def stride_four(image: Tensor) -> Tensor:
    """A network without parameters, whose logits also depend on the place in its input."""
    batch = image.float()[None] / 64
    shape = (-(-image.shape[-2] // 4), -(-image.shape[-1] // 4))
    maps = F.adaptive_avg_pool2d(batch, shape) + F.adaptive_max_pool2d(batch, shape).roll(1, 1)
    return maps * torch.linspace(0.5, 1.5, shape[1])


def network(image: Tensor) -> Tensor:
    """(K, H, W), as protocols take it."""
    return bilinear(stride_four(image), (image.shape[-2], image.shape[-1]))[0]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- whole image


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (24, 33), (40, 40)])
def test_whole_image_is_resized_to_the_input_and_then_to_the_original(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    model = build_tiny_model(config(tmp_path))
    assert isinstance(model.protocol, WholeImage)
    image = tensor(photograph(21, 30))
    out = model([{"image": image, "height": size[0], "width": size[1]}])[0]["sem_seg"]
    normalized = (image - model.pixel_mean) / model.pixel_std
    logits = model.sem_seg_head.semantic_fpn(model.backbone(normalized[None]))
    assert out.shape == (CLASSES, *size)
    expected = bilinear(bilinear(logits, (21, 30)), size)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_priors_come_from_the_same_pass(tmp_path: Path) -> None:
    model = build_tiny_model(config(tmp_path))
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.backbone.register_forward_hook(count)
    inputs = [{"image": tensor(photograph(21, 30)), "height": 10, "width": 11}]
    out = model.inference(inputs, return_priors=True)[0]
    assert passes == 1
    assert set(out) == {"sem_seg", "prior", "priors"}
    assert torch.equal(out["sem_seg"], model(inputs)[0]["sem_seg"])


# ---- sliding window


def test_window_starts_cover_the_side_and_stay_inside() -> None:
    assert window_starts(10, 4, 3) == [0, 3, 6]
    assert window_starts(11, 4, 3) == [0, 3, 6, 7]
    assert window_starts(4, 4, 3) == [0]
    assert window_starts(3, 4, 3) == [0]
    assert window_starts(5, 4, 4) == [0, 1]
    for length in range(1, 40):
        for crop in range(1, 12):
            for stride in range(1, crop + 1):
                starts = window_starts(length, crop, stride)
                side = min(crop, length)
                covered = {start + i for start in starts for i in range(side)}
                assert covered == set(range(length))
                assert len(set(starts)) == len(starts)


def windows_in_numpy(
    network: Callable[[Tensor], Tensor], image: Tensor, crop: tuple[int, int], step: tuple[int, int]
) -> np.ndarray:
    """Every pixel separately: the mean over all windows that have it."""
    height, width = image.shape[-2:]
    predicted: list[tuple[tuple[int, int], np.ndarray]] = []
    for first_row in range(0, height, step[0]):
        for first_column in range(0, width, step[1]):
            bottom = min(first_row + crop[0], height)
            right = min(first_column + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            if any((top, left) == place for place, _ in predicted):
                continue
            window = image[:, top:bottom, left:right]
            logits = bilinear(network(window), (bottom - top, right - left))[0]
            predicted.append(((top, left), logits.double().numpy()))
    result = np.zeros((CLASSES, height, width))
    for row in range(height):
        for column in range(width):
            values = [
                logits[:, row - top, column - left]
                for (top, left), logits in predicted
                if 0 <= row - top < logits.shape[1] and 0 <= column - left < logits.shape[2]
            ]
            assert values
            result[:, row, column] = np.mean(values, axis=0)
    return result


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((20, 28), (8, 8), (5, 6)),
        ((21, 33), (10, 7), (3, 7)),  # odd sides, windows without overlap in one direction
        ((9, 40), (16, 16), (11, 5)),  # less high than a window
        ((1, 17), (4, 4), (2, 3)),
    ],
)
def test_sliding_window_averages_every_pixel_over_its_windows(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> None:
    image = tensor(photograph(*size))
    out = SlidingWindow(crop=crop, stride=stride)(network, {"image": image}, size, "logits")
    expected = windows_in_numpy(stride_four, image, crop, stride)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-5)


def test_sliding_window_resizes_the_average_to_the_original_size(tmp_path: Path) -> None:
    cfg = config(tmp_path, PROTOCOL="slide", SLIDE_CROP=[16, 20], SLIDE_STRIDE=[9, 12])
    model = build_tiny_model(cfg)
    image = tensor(photograph(30, 40))

    def network(window: Tensor) -> Tensor:
        normalized = (window - model.pixel_mean) / model.pixel_std
        return model.sem_seg_head.semantic_fpn(model.backbone(normalized[None]))

    average = windows_in_numpy(network, image, (16, 20), (9, 12))
    out = model([{"image": image, "height": 45, "width": 61}])[0]["sem_seg"]
    expected = bilinear(torch.from_numpy(average)[None], (45, 61))[0]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    whole = build_tiny_model(config(tmp_path))([{"image": image, "height": 45, "width": 61}])
    assert (whole[0]["sem_seg"] - out).abs().max() > 1e-3  # windows see less


@pytest.mark.parametrize("crop", [(30, 40), (31, 64)])
def test_window_as_large_as_the_image_is_the_whole_image(
    tmp_path: Path, crop: tuple[int, int]
) -> None:
    cfg = config(tmp_path, PROTOCOL="slide", SLIDE_CROP=list(crop), SLIDE_STRIDE=[7, 9])
    inputs = [{"image": tensor(photograph(30, 40)), "height": 45, "width": 61}]
    slide = build_tiny_model(cfg)(inputs)[0]["sem_seg"]
    whole = build_tiny_model(config(tmp_path))(inputs)[0]["sem_seg"]
    torch.testing.assert_close(slide, whole, rtol=0, atol=1e-5)


def test_sliding_window_adds_up_in_single_precision() -> None:
    image = tensor(photograph(24, 24))
    protocol = SlidingWindow(crop=(16, 16), stride=(4, 4))
    for given, summed in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        out = protocol(lambda w, to=given: network(w).to(to), {"image": image}, (24, 24), "logits")
        assert out.dtype == summed


@pytest.mark.parametrize(
    "keys",
    [
        {"SLIDE_STRIDE": [17, 16], "SLIDE_CROP": [16, 16]},
        {"SLIDE_STRIDE": [0, 1], "SLIDE_CROP": [16, 16]},
        {"SLIDE_CROP": [16]},
    ],
)
def test_windows_that_cannot_cover_the_image_are_refused(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"TEST\.SLIDE_STRIDE"):
        build_model(config(tmp_path, PROTOCOL="slide", **keys))


# ---- multi-scale


def multi_scale(folder: Path, factors: list[float], flip: bool) -> CfgNode:
    keys = {"MULTI_SCALE_FACTORS": factors, "MULTI_SCALE_FLIP": flip}
    return config(folder, PROTOCOL="multi_scale", **keys)


def test_factor_one_without_flip_is_the_softmax_of_the_whole_image(tmp_path: Path) -> None:
    cfg, plain = multi_scale(tmp_path, [1.0], flip=False), config(tmp_path)
    pixels = photograph(33, 27)
    out = build_tiny_model(cfg)([SemSegMapper(cfg, is_train=False).transform(pixels)])[0]["sem_seg"]
    whole = build_tiny_model(plain)([SemSegMapper(plain, is_train=False).transform(pixels)])
    torch.testing.assert_close(out, whole[0]["sem_seg"].softmax(dim=0), rtol=0, atol=1e-6)


def test_multi_scale_is_the_mean_over_scales_and_mirrors_of_the_original(tmp_path: Path) -> None:
    factors = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    cfg = multi_scale(tmp_path, factors, flip=True)
    model = build_tiny_model(cfg)
    pixels = photograph(23, 31)
    out = model([SemSegMapper(cfg, is_train=False).transform(pixels)])[0]["sem_seg"]

    mean, std = (np.array(cfg.MODEL[key], np.float32) for key in ("PIXEL_MEAN", "PIXEL_STD"))
    predictions = []
    for factor in factors:
        long, short = (int(side * factor) for side in cfg.INPUT.SCALE)
        scale = min(long / 31, short / 23)
        width, height = int(31 * scale + 0.5), int(23 * scale + 0.5)
        resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
        for picture in (resized, resized[:, ::-1]):
            batch = tensor((picture.astype(np.float32) - mean) / std)[None]
            logits = model.sem_seg_head.semantic_fpn(model.backbone(batch))
            scores = bilinear(bilinear(logits, (height, width)), (23, 31))[0].double().numpy()
            scores = np.exp(scores) / np.exp(scores).sum(axis=0)
            predictions.append(scores if picture is resized else scores[:, :, ::-1])
    np.testing.assert_allclose(out.numpy(), np.mean(predictions, axis=0), rtol=0, atol=2e-6)
    torch.testing.assert_close(out.sum(dim=0), torch.ones(23, 31))


def test_a_mirrored_image_gives_the_mirrored_prediction() -> None:
    image = tensor(photograph(21, 30))
    protocol = MultiScale(flip=True)
    size = (25, 36)
    out = protocol(network, {"images": [image]}, size, "logits")
    mirrored = protocol(network, {"images": [image.flip(-1)]}, size, "logits")
    torch.testing.assert_close(mirrored, out.flip(-1), rtol=0, atol=1e-6)
    once = MultiScale(flip=False)(network, {"images": [image]}, size, "logits")
    assert (once - out).abs().max() > 1e-3


def test_scores_that_are_no_logits_are_averaged_as_they_are() -> None:
    image = tensor(photograph(21, 30))
    protocol = MultiScale(flip=True)
    assert protocol.score_kind("scores") == "scores"
    assert protocol.score_kind("logits") == "probabilities"
    out = protocol(network, {"images": [image]}, (21, 30), "scores")
    mirrored = network(image.flip(-1)).flip(-1)
    torch.testing.assert_close(out, (network(image) + mirrored) / 2)


def test_multi_scale_without_the_scaled_images_says_what_is_missing(tmp_path: Path) -> None:
    model = build_tiny_model(multi_scale(tmp_path, [1.0], flip=True))
    with pytest.raises(ConfigError, match=r"TEST\.PROTOCOL.*build_mapper"):
        model([{"image": tensor(photograph(21, 30))}])


@pytest.mark.parametrize("factors", [[], [1.0, 0.0], [-0.5]])
def test_factors_that_cannot_be_used_are_refused(tmp_path: Path, factors: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"TEST\.MULTI_SCALE_FACTORS"):
        SemSegMapper(multi_scale(tmp_path, factors, flip=True), is_train=False)


def test_mapper_adds_the_scaled_images_for_this_protocol_alone(tmp_path: Path) -> None:
    cfg = multi_scale(tmp_path, [0.5, 2.0], flip=True)
    cfg.INPUT.FORMAT = "BGR"
    Image.fromarray(photograph(20, 40)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png")}
    small, large = SemSegMapper(cfg, is_train=False)(record)["images"]
    assert [tuple(image.shape) for image in (small, large)] == [(3, 10, 20), (3, 40, 80)]
    expected = cv2.resize(photograph(20, 40), (20, 10), interpolation=cv2.INTER_LINEAR)
    assert torch.equal(small, tensor(expected[:, :, ::-1]))
    assert SemSegMapper(cfg, is_train=True).test_scales == []
    assert "images" not in SemSegMapper(config(tmp_path), is_train=False)(record)


# ---- the choice in the config


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TEST\.PROTOCOL is 'sliding'.*'slide'"):
        build_model(config(tmp_path, PROTOCOL="sliding"))


PROTOCOLS = [
    {"PROTOCOL": "slide", "SLIDE_CROP": [16, 16], "SLIDE_STRIDE": [12, 12]},
    {"PROTOCOL": "multi_scale", "MULTI_SCALE_FACTORS": [0.5, 1.25]},
]


@pytest.mark.parametrize("keys", PROTOCOLS, ids=lambda keys: keys["PROTOCOL"])
def test_evaluation_during_training_and_alone_use_it(tmp_path: Path, keys: dict[str, Any]) -> None:
    """The numbers of both are those of the protocol, computed here image by image."""
    path = tiny.write_config(tmp_path / "run.yaml", TEST=keys, SOLVER={"MAX_ITER": 1})
    trained, alone = tmp_path / "trained", tmp_path / "alone"
    command = ["--config-file", path, "MODEL.DEVICE", "cpu", "OUTPUT_DIR"]
    with tiny.datasets(tmp_path) as records, tiny.own_loggers():
        with torch.enable_grad():
            assert train_net.run([*command, str(trained)]) == 0
        weights = ["MODEL.WEIGHTS", str(trained / "model_final.pth")]
        assert train_net.run(["--eval-only", *command, str(alone), *weights]) == 0
        cfg = load_config(path, ["MODEL.DEVICE", "cpu"])
        model = build_model(cfg).eval()
        model.load_state_dict(torch.load(trained / "model_final.pth", weights_only=True)["model"])
        correct = pixels = 0
        for record in records[4:]:
            out = model([SemSegMapper(cfg, is_train=False)(record)])[0]["sem_seg"]
            label = np.array(Image.open(record["sem_seg_file_name"]))
            hits = out.argmax(dim=0).numpy() == label
            correct, pixels = correct + hits.sum(), pixels + (label != 255).sum()
    for folder in (trained, alone):
        file = folder / "inference/tiny_val/sem_seg_evaluation.json"
        results = json.loads(file.read_text())["results"]
        assert results["pACC"] == pytest.approx(100 * correct / pixels)
        assert (folder / "panels.png").stat().st_size > 0
