"""The page to try a model: its command, its address, and in a browser what is seen of it."""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo_parts import HEIGHT, MODELS, WIDTH, Plugin, pixels, predictor_of, save_photo
from semask.cli import main
from semask.demo.answer import Demo
from semask.demo.page import serving
from semask.errors import ConfigError
from semask.inference.prediction import ImagePrediction, InstancePrediction, Prediction
from tiny_model import checkpoint

CHROMIUM = "/usr/bin/chromium"

# Nothing here is large enough for threads.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_photo(tmp_path)


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
