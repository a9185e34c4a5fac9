"""The page to try a model: what it says of a file, and in a browser what is seen of it."""

import base64
import io
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from semask import load_config
from semask.cli import main
from semask.demo.answer import Demo, Limits
from semask.demo.page import serving
from semask.errors import ConfigError
from semask.inference.prediction import ImagePrediction, InstancePrediction, Prediction
from semask.inference.predictor import ImagePredictor, Predictor
from semask.inference.video import VideoReader, writing_video
from tiny_instances import SMALL_MODEL, flat
from tiny_model import checkpoint, config, photograph

CHROMIUM = "/usr/bin/chromium"
HEIGHT, WIDTH = 60, 90
MODELS = {
    "instance": "coco/semask_swin_tiny_mask_rcnn_1x",
    "panoptic": "coco/semask_swin_tiny_panoptic_fpn_1x",
}


@pytest.fixture(autouse=True)
def slowly(one_thread: None) -> None:
    """Nothing here is large enough for threads."""


def predictor_of(kind: str, folder: Path) -> ImagePredictor:
    if kind == "semantic":
        return Predictor(config(folder), checkpoint(folder))
    keys = {
        "DATASETS.TRAIN": (),
        "DATASETS.TEST": (),
        "INPUT.MIN_SIZE_TEST": 50,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
        "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 1,
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.0,
        "TEST.DETECTIONS_PER_IMAGE": 7,
    }
    cfg = load_config(MODELS[kind], flat({**SMALL_MODEL, **keys}))
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    predictor: ImagePredictor = Predictor(cfg, folder / "model.pth")
    return predictor


class Plugin(ImagePredictor):
    """A predictor that somebody else has written."""

    has_priors = False

    def __init__(self, predict: Callable[[], ImagePrediction]) -> None:
        self.predict = predict

    def _set_up(self) -> None: ...

    def __call__(self, image: Any, *, priors: bool = False) -> ImagePrediction:
        return self.predict()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "my <photo>.png"
    Image.fromarray(photograph(HEIGHT, WIDTH)).save(path)
    return path


def save_video(path: Path, frames: int = 6) -> None:
    with writing_video(path, 5) as video:
        for index in range(frames):
            video.write(photograph(HEIGHT, WIDTH, seed=index))


class Page(HTMLParser):
    """The elements of a page: (tag, attributes) in order, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, of_class: str = "") -> list[dict[str, str]]:
        found = [values for name, values in self.elements if name == tag]
        return [values for values in found if of_class in values.get("class", "").split() + [""]]

    def downloads(self) -> dict[str, bytes]:
        return {link["download"]: content(link["href"]) for link in self.all("a")}


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2])


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image)


def rgb(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(content(uri))) as image:
        return np.array(image.convert("RGB"))


# ---- without gradio


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
    layers = [rgb(each["src"]) for each in page.all("img", "layer")]
    assert np.array_equal(layers[1], expected.overlay(1, min_score=0.0))
    assert len(layers) == 2 + len(expected.prior_pictures())
    assert all(name in page.text for name in expected.prior_names[:1])
    if kind == "panoptic":
        assert answer.prediction is None
        return
    assert "7 instances" in page.text
    assert answer.prediction is not None
    redrawn = demo.drawn(answer.prediction, photo.name, min_score=1.0).html
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
            tmp_path / "drive.avi", report=lambda done, total: seen.append((done, total))
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
    assert "Video 'cut.avi' announces 6 frames" in page.text
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


def test_arguments_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--config", "scenes/semask_scenes", "--weights", "nowhere.pth"]
    for option, value in (
        ("--min-score", "2"),
        ("--max-size", "huge"),
        ("--max-frames", "0"),
        ("--max-megapixels", "-1"),
        ("--max-megapixels", "nan"),
        ("--max-megapixels", "inf"),
        ("--port", "99999"),
        ("--port", "0"),
    ):
        assert main.run("demo", [*model, option, value]) == 2
        assert option in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main.run("demo", model) == 2
    assert "semask[demo]" in capsys.readouterr().err


def test_addresses_that_cannot_be_used() -> None:
    pytest.importorskip("gradio", reason="needs the package gradio")
    demo = Demo(Plugin(lambda: pytest.fail("nothing is predicted")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)), serving(demo, port=port):
            pass
    with pytest.raises(ConfigError, match="nowhere"), serving(demo, host="nowhere.invalid"):
        pass


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("gradio", reason="needs the package gradio")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"needs the browser {CHROMIUM}")
    with sync_api.sync_playwright() as play:
        # No other browser that happens to be there: its version would be another.
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """A page in the browser, and what it has asked for."""

    def __init__(self, browser: Any, url: str, width: int = 1280) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        answer = self.page.goto(url)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        self.url = url

    def upload(self, path: Path, wait_for: str = ".answer, .problem") -> None:
        self.page.wait_for_selector("#upload input[type=file]", state="attached")
        self.page.set_input_files("#upload input[type=file]", str(path))
        self.page.wait_for_selector(wait_for, timeout=60_000)

    def download(self) -> tuple[str, bytes]:
        with self.page.expect_download() as waiting:
            self.page.click(".files a >> nth=0")
        return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()

    def tip(self, x: float, y: float) -> str:
        """What is written at the pointer, at a place in the picture, 0..1."""
        self.page.locator(".shown .stack").scroll_into_view_if_needed()
        box = self.page.locator(".shown .stack").bounding_box()
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        return str(self.page.locator(".shown .tip").inner_text())

    def leave(self) -> None:
        assert not self.errors
        own = (self.url, "data:", "blob:")
        assert [url for url in self.requests if not url.startswith(own)] == []
        self.page.close()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_page_for_a_semantic_model(
    browser: Any, tmp_path: Path, temporary: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def recorded(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", recorded)
    before = set(os.environ)
    predictor = predictor_of("semantic", tmp_path)
    expected = predictor.in_detail(photo)
    assert isinstance(expected, Prediction)
    assert expected.confidence is not None
    with serving(Demo(predictor), max_size=60_000) as url:
        assert url.startswith("http://127.0.0.1:")
        visit = Visit(browser, url)
        visit.upload(photo)
        for y, x in ((10, 20), (33, 71)):
            name = expected.class_names[expected.labels[y, x]]
            percent = round(100 * expected.confidence[y, x])
            tip = visit.tip((x + 0.5) / WIDTH, (y + 0.5) / HEIGHT)
            assert tip in {f"{name} · {near} %" for near in (percent - 1, percent, percent + 1)}
        layer = visit.page.locator(".shown .layer").nth(1)
        assert layer.evaluate("each => getComputedStyle(each).opacity") == "0.5"
        visit.page.locator(".opacity input").fill("80")
        assert layer.evaluate("each => getComputedStyle(each).opacity") == "0.8"
        name, data = visit.download()
        assert name.endswith("_labels.png")
        assert np.array_equal(pixels(data), expected.labels)
        captions = visit.page.locator("figcaption").all_inner_texts()
        assert [text for text in captions if "prior of stage 1" in text]
        assert visit.page.locator(".legend li").count() == len(np.unique(expected.labels))

        large = tmp_path / "large.png"
        large.write_bytes(bytes(70_000))
        visit.upload(large, wait_for=".toast-body")
        assert large.name in visit.page.inner_text(".toast-body")
        cut = tmp_path / "cut.png"
        cut.write_bytes(photo.read_bytes()[:500])
        visit.upload(cut, wait_for=".problem")
        assert "'cut.png'" in visit.page.inner_text(".problem")
        visit.upload(photo, wait_for=".answer")  # the opacity stays
        assert layer.evaluate("each => getComputedStyle(each).opacity") == "0.8"
        visit.leave()
        assert not [path for path in temporary.rglob("*") if path.is_file()]
    assert not list(temporary.iterdir())
    assert set(os.environ) == before
    assert set(asked) <= {"127.0.0.1", "localhost"}


@pytest.mark.parametrize("kind", MODELS)
def test_a_page_for_instances_and_segments(
    browser: Any, tmp_path: Path, photo: Path, kind: str
) -> None:
    demo = Demo(predictor_of(kind, tmp_path))
    expected = demo.predictor.in_detail(photo)
    assert isinstance(expected, InstancePrediction)
    shown = expected.regions(min_score=0.0)["overlay"]
    with serving(demo, min_score=0.0) as url:
        visit = Visit(browser, url, width=390)
        visit.upload(photo)
        y, x = np.argwhere(shown.index >= 0)[0].tolist()
        assert shown.names[shown.index[y, x]] in visit.tip((x + 0.5) / WIDTH, (y + 0.5) / HEIGHT)
        width = visit.page.evaluate("document.documentElement.scrollWidth")
        assert width == 390  # a phone need not scroll sideways
        slider = visit.page.get_by_label("range slider for Minimum score")
        assert slider.count() == (kind == "instance")
        if kind == "instance":
            slider.fill("1")
            slider.dispatch_event("pointerup")
            visit.page.wait_for_selector("text=Nothing was found")
        visit.leave()


def test_two_people_with_the_same_file(
    browser: Any, tmp_path: Path, temporary: Path, photo: Path
) -> None:
    """Both get an answer, though gradio has one place for what is the same."""
    prediction = predictor_of("semantic", tmp_path).in_detail(photo)
    both_are_there = threading.Event()

    def wait() -> ImagePrediction:
        assert both_are_there.wait(30)
        return prediction

    with serving(Demo(Plugin(wait))) as url:
        visits = [Visit(browser, url), Visit(browser, url)]
        for visit in visits:
            visit.page.wait_for_selector("#upload input[type=file]", state="attached")
            with visit.page.expect_request("**/queue/join*"):
                visit.page.set_input_files("#upload input[type=file]", str(photo))
        both_are_there.set()
        for visit in visits:
            visit.page.wait_for_selector(".answer, .problem", timeout=30_000)
            assert visit.page.locator(".answer").count()
            visit.leave()
        assert not [path for path in temporary.rglob("*") if path.is_file()]


def test_the_command_ends_without_a_trace(
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("gradio", reason="needs the package gradio")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    seen: list[list[str]] = []

    def interrupt() -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=10).close()
            except OSError:
                time.sleep(0.1)
                continue
            seen.append([path.name for path in temporary.iterdir()])
            break
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    visitor = threading.Thread(target=interrupt)
    model = ["--config", "config.yaml", "--weights", checkpoint(tmp_path), "--device", "cpu"]
    visitor.start()
    try:
        status = main.run("demo", [*model, "--port", str(port)])
    finally:
        visitor.join()
    assert status == 0
    assert capsys.readouterr().out.startswith(address)
    assert [name[:12] for name in seen[0]] == ["semask_demo_"]
    assert not list(temporary.iterdir())
    assert signal.getsignal(signal.SIGINT) is before
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "model.pth", "temporary"}
