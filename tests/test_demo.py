"""The page to try a model: what it says of a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from demo_parts import (
    HEIGHT,
    MODELS,
    WIDTH,
    Page,
    Plugin,
    content,
    pixels,
    predictor_of,
    rgb,
    save_photo,
    save_video,
)
from semask.demo.answer import Demo, Limits
from semask.inference.masks import RunLengthMasks
from semask.inference.prediction import ImagePrediction, InstancePrediction, Prediction
from semask.inference.video import VideoReader
from tiny_model import photograph

# Use one thread: the tensors are too small for more.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_photo(tmp_path)


def test_the_answer_holds_the_prediction(tmp_path: Path, photo: Path) -> None:
    predictor = predictor_of("semantic", tmp_path)
    answer = Demo(predictor).answer(photo)
    page = Page(answer.html)
    expected = predictor.in_detail(photo)
    assert isinstance(expected, Prediction)
    assert expected.confidence is not None
    assert "my <photo>.png" in page.text  # escaped
    files = page.downloads()
    assert np.array_equal(pixels(files["my <photo>_labels.png"]), expected.labels)
    assert json.loads(files["classes.json"])["classes"][1]["name"] == expected.class_names[1]

    stacks, maps = page.all("div", "stack"), [rgb(each["src"]) for each in page.all("img", "map")]
    assert len(stacks) == len(maps) == 2 + len(expected.prior_pictures())  # and the confidence
    assert json.loads(stacks[0]["data-names"]) == list(expected.class_names)
    regions = maps[0][..., :2].astype(int) @ (1, 256) - 1
    assert np.array_equal(regions, expected.labels)
    assert np.allclose(maps[0][..., 2] / 255, expected.confidence, atol=0.003)
    layers = [rgb(each["src"]) for each in page.all("img", "layer")]
    assert np.abs(layers[0].astype(int) - expected.image).mean() < 12  # a JPEG of noise
    assert np.array_equal(layers[1], expected.colored)
    for layer, picture in zip(layers[3:], expected.prior_pictures().values(), strict=True):
        assert np.array_equal(layer, picture)
    assert {name for name in expected.class_names if name in page.text} == {
        expected.class_names[index] for index in np.unique(expected.labels)
    }
    assert answer.prediction is None  # nothing of it depends on a score


@pytest.mark.parametrize("kind", MODELS)
def test_instances_and_segments(tmp_path: Path, photo: Path, kind: str) -> None:
    demo = Demo(predictor_of(kind, tmp_path))
    answer = demo.answer(photo, min_score=0.0)
    page, files = Page(answer.html), Page(answer.html).downloads()
    expected = demo.predictor.in_detail(photo)
    assert isinstance(expected, InstancePrediction)
    assert json.loads(files["my <photo>_instances.json"]) == expected.coco_results("my <photo>")
    assert ("my <photo>_panoptic.png" in files) == (kind == "panoptic")
    if answer.prediction is not None:  # of little memory: the page keeps it for an hour
        assert isinstance(answer.prediction, InstancePrediction)
        assert isinstance(answer.prediction.each_mask, RunLengthMasks)
    layers = [rgb(each["src"]) for each in page.all("img", "layer")]
    assert np.array_equal(layers[1], expected.overlay(1, min_score=0.0))
    assert len(layers) == 2 + len(expected.prior_pictures())
    assert all(name in page.text for name in expected.prior_names[:1])
    if kind == "panoptic":
        assert answer.prediction is None
        return
    assert "7 instances" in page.text
    assert answer.prediction is not None
    redrawn = demo.render(answer.prediction, photo.name, min_score=1.0).html
    assert "Nothing was found" in Page(redrawn).text


def test_a_prediction_that_says_nothing_of_its_regions(photo: Path) -> None:
    class Plain(ImagePrediction):
        image = photograph(HEIGHT, WIDTH)

        def pictures(self, *, alpha: float = 0.5, min_score: float = 0.5) -> dict[str, np.ndarray]:
            return {
                "overlay": np.uint8(alpha * 255) * np.ones_like(self.image),
                "depth": self.image,
            }

        def save(self, folder: str, name: str) -> None:
            Path(folder, f"{name}.txt").write_text("far")

        def save_classes(self, folder: str) -> None: ...

    page = Page(Demo(Plugin(Plain)).answer(photo).html)
    assert page.downloads() == {"my <photo>.txt": b"far"}
    assert "Depth" in page.text
    assert rgb(page.all("img", "layer")[1]["src"]).min() == 255
    assert not page.all("img", "map")


def test_pictures_are_shown_no_larger_than_a_screen(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.fromarray(photograph(16, 1700)).save(path)
    page = Page(Demo(predictor_of("semantic", tmp_path)).answer(path).html)
    sizes = {rgb(each["src"]).shape[1] for each in page.all("img", "layer")}
    assert sizes == {1600}
    assert pixels(page.downloads()["wide_labels.png"]).shape == (16, 1700)


def test_a_video(tmp_path: Path) -> None:
    save_video(tmp_path / "drive.avi")
    demo = Demo(predictor_of("semantic", tmp_path), Limits(frames=4))
    seen: list[tuple[int, int]] = []
    page = Page(
        demo.answer(
            tmp_path / "drive.avi", progress=lambda done, total: seen.append((done, total))
        ).html
    )
    assert seen == [(count, 4) for count in range(1, 5)]
    videos = page.all("video")
    assert len(videos) == 3  # with the priors
    assert all(content(video["src"])[4:8] == b"ftyp" for video in videos)
    assert "first 4 of 6 frames" in page.text
    labels = page.downloads()["drive_000000_labels.png"]
    with VideoReader(tmp_path / "drive.avi") as frames:
        expected = demo.predictor.in_detail(next(iter(frames)))
    assert isinstance(expected, Prediction)
    assert np.array_equal(pixels(labels), expected.labels)


def problem_with(demo: Demo, path: Path) -> str:
    page = Page(demo.answer(path).html)
    assert page.all("p", "problem")
    assert path.name in page.text
    assert str(path.parent) not in page.text
    return page.text


def test_what_is_wrong_is_a_sentence(tmp_path: Path, photo: Path) -> None:
    demo = Demo(predictor_of("semantic", tmp_path), Limits(pixels=WIDTH * HEIGHT - 1))
    assert "--max-megapixels" in problem_with(demo, photo)
    save_video(tmp_path / "film.avi")
    assert "--max-megapixels" in problem_with(demo, tmp_path / "film.avi")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:500])
    problem_with(demo, tmp_path / "cut.png")
    problem_with(demo, tmp_path / "removed.png")
    (tmp_path / "empty.mp4").write_bytes(b"")
    problem_with(demo, tmp_path / "empty.mp4")

    whole = (tmp_path / "film.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    page = Page(Demo(demo.predictor).answer(tmp_path / "cut.avi").html)
    assert "Video 'cut.avi' states 6 frames" in page.text
    assert page.all("video")


def test_the_size_of_files_with_bands_is_limited(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="needs the package tifffile")
    bands = np.zeros((HEIGHT, WIDTH, 7), np.uint8)
    tifffile.imwrite(tmp_path / "bands.tif", bands, planarconfig="contig", photometric="minisblack")
    np.save(tmp_path / "bands.npy", bands)

    def decoded() -> ImagePrediction:
        raise AssertionError("the file has been decoded")

    demo = Demo(Plugin(decoded), Limits(pixels=WIDTH * HEIGHT - 1))
    for name in ("bands.tif", "bands.npy"):
        assert f"{WIDTH} x {HEIGHT}" in problem_with(demo, tmp_path / name)


def test_too_little_memory_is_a_sentence(photo: Path) -> None:
    def fail(error: Exception) -> Any:
        raise error

    greedy = Plugin(lambda: fail(torch.OutOfMemoryError()))
    assert "TEST.PROTOCOL" in problem_with(Demo(greedy), photo)
    with pytest.raises(RuntimeError, match="another"):
        Demo(Plugin(lambda: fail(RuntimeError("another")))).answer(photo)
