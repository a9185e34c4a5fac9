"""The evaluation report: its page, and how a browser shows it."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image

from browser import assert_is_readable, count, screenshot
from oracle import HEIGHT, IGNORE, NAME, NAMES, WIDTH, Oracle, OracleWithPriors, dataset, label_of
from semask.errors import DataError
from semask.evaluation import (
    BoundaryIoU,
    Metric,
    SemSegConfusionEvaluator,
)
from semask.report.semantic import report_metrics, write_report


@pytest.fixture
def records(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    with dataset(tmp_path) as records:
        yield records


def evaluate(
    folder: Path, model: Oracle, records: list[dict[str, Any]], *more: Metric
) -> dict[str, Any]:
    """The result file of an evaluation."""
    evaluator = SemSegConfusionEvaluator(
        NAME, output_dir=str(folder), metrics=[*report_metrics(), *more]
    )
    with torch.no_grad():
        for record in records:
            evaluator.process([record], model([record]))
    evaluator.evaluate()
    return json.loads((folder / "sem_seg_evaluation.json").read_text())


def report(folder: Path, model: Oracle, **options: Any) -> str:
    return Path(write_report(model, NAME, dict, str(folder), **options)).read_text()


# ---- the page ----


class Collector(HTMLParser):
    """Everything a browser could load from an address, and the nesting of the elements."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "xlink:href"):
                self.addresses.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Collector:
    collector = Collector()
    collector.feed(page)
    collector.close()
    assert collector.open == []
    return collector


def texts(page: str, path: str) -> list[str]:
    root = ET.fromstring(page.split("\n", 1)[1])  # without the line <!DOCTYPE html>
    return [" ".join("".join(element.itertext()).split()) for element in root.findall(path)]


def test_page_is_well_formed_and_needs_no_network(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    model = OracleWithPriors()
    evaluate(tmp_path, model, records, BoundaryIoU(NAMES))
    page = report(tmp_path, model)
    assert page.startswith("<!DOCTYPE html>\n<html lang")
    collector = parsed(page)
    assert collector.addresses
    assert all(address.startswith("data:image/") for address in collector.addresses)
    tags = {tag for tag, _ in collector.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "audio", "video"}
    assert not re.search(r"https?:|url\(|@import|javascript:", page)
    policy = [values for _, values in collector.elements if "http-equiv" in values]
    assert str(policy[0]["content"]).startswith("default-src 'none'")


def test_a_file_name_that_is_not_utf_8(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    odd = str(Path(records[0]["file_name"]).with_name("0.jpg\udce9"))
    Path(records[0]["file_name"]).rename(odd)
    records[0]["file_name"] = odd
    evaluate(tmp_path, Oracle(), records)
    assert r"0.jpg\udce9" in report(tmp_path, Oracle(), num_images=10)


def test_log_says_where_the_page_is(
    tmp_path: Path, records: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model = OracleWithPriors()
    evaluate(tmp_path, model, records)
    with caplog.at_level("INFO", logger="semask"):
        path = write_report(model, NAME, dict, str(tmp_path))
    assert f"Report: {path}" in caplog.messages


def test_pictures_decode_and_say_what_they_show(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    model = OracleWithPriors()
    evaluate(tmp_path, model, records)
    images = [values for tag, values in parsed(report(tmp_path, model)).elements if tag == "img"]
    # Four worst and four best, each with image, truth, prediction, errors, two priors, their sum.
    assert len(images) == 8 * 7
    for values in images:
        content = base64.b64decode(str(values["src"]).split(",", 1)[1])
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            assert picture.width <= WIDTH
        assert values["alt"]
        assert values["style"] == f"aspect-ratio:{WIDTH} / {HEIGHT}"
    alts = [str(values["alt"]) for values in images]
    assert alts[1].startswith("Ground truth: sky & <clouds> 38 %, road 36 %")
    assert any(alt.startswith("Prior, stride 8: ") for alt in alts)
    assert alts[3] == "Wrong pixels in orange: 56.2 % of labelled pixels"


def test_prediction_and_ground_truth_are_drawn_in_class_colours(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    colors = [[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]]
    MetadataCatalog.get(NAME).stuff_colors = colors
    model = Oracle()
    evaluate(tmp_path, model, records)
    images = [values for tag, values in parsed(report(tmp_path, model)).elements if tag == "img"]
    best = images[-4 * 4 : -3 * 4]  # the first image of the dataset, of which nothing is wrong
    truth, prediction = (
        np.array(
            Image.open(io.BytesIO(base64.b64decode(str(values["src"]).split(",", 1)[1]))).convert(
                "RGB"
            )
        )
        for values in best[1:3]
    )
    expected = np.array(colors, dtype=np.uint8)[np.where(label_of(0) == IGNORE, 0, label_of(0))]
    assert np.array_equal(prediction, expected)
    assert np.array_equal(truth[2:], expected[2:])
    assert not np.array_equal(truth[:2], expected[:2])  # hatched


def test_numbers_equal_the_metrics(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    model = Oracle()
    document = evaluate(tmp_path, model, records, BoundaryIoU(NAMES))
    results = document["results"]
    page = report(tmp_path, model, facts=[("Weights", "model <final>.pth")])
    tiles = dict(
        zip(
            texts(page, ".//div[@class='tile']/div[@class='name']"),
            texts(page, ".//div[@class='tile']/div[@class='value']"),
            strict=True,
        )
    )
    for key in ("mIoU", "pACC", "mACC", "fwIoU", "mBoundaryIoU"):
        assert tiles[key] == f"{results[key]:.2f} %"
    error = document["calibration"]["expected_calibration_error"]
    assert tiles["ECE"] == f"{100 * error:.2f} %"

    facts = texts(page, ".//dl/div")
    assert re.fullmatch(r"Evaluated\d{4}-\d\d-\d\d \d\d:\d\d", facts[0])
    assert {"Images10", "Classes4", "Weightsmodel <final>.pth"} <= set(facts)

    names = texts(page, ".//table[@class='bars']/tbody/tr/th")
    assert sorted(names) == sorted(NAMES)
    assert names[-1] == "never seen"
    rows = [
        [text.strip() for text in row]
        for row in zip(
            *(
                texts(page, f".//table[@class='bars']/tbody/tr/td[{column}]")
                for column in (2, 3, 4)
            ),
            strict=True,
        )
    ]
    for name, row in zip(names, rows, strict=True):
        expected = [results[f"{key}-{name}"] for key in ("IoU", "BoundaryIoU", "ACC")]
        assert row == ["–" if value is None else f"{value:.2f}" for value in expected]
    values = [float(row[0]) for row in rows[:-1]]
    assert values == sorted(values, reverse=True)


def test_worst_and_best_images(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    model = Oracle()
    document = evaluate(tmp_path, model, records)
    model.calls = 0
    page = report(tmp_path, model, num_images=2)
    assert model.calls == 4
    titles = texts(page, ".//article/h4")
    assert [title.split()[0] for title in titles] == ["9.jpg", "8.jpg", "0.jpg", "1.jpg"]
    scores = {Path(image["file_name"]).name: image for image in document["images"]}
    worst = scores["9.jpg"]
    assert titles[0].endswith(f"mIoU {worst['mIoU']:.2f} % · pixel accuracy {worst['pACC']:.2f} %")
    assert scores["0.jpg"]["pACC"] == 100
    assert texts(page, ".//h3") == ["Worst", "Best"]


@pytest.mark.parametrize(
    ("images", "asked", "shown"), [(1, 4, ["0"]), (3, 4, ["2", "1", "0"]), (5, 0, [])]
)
def test_few_images_are_shown_once_each(
    tmp_path: Path, records: list[dict[str, Any]], images: int, asked: int, shown: list[str]
) -> None:
    model = Oracle()
    evaluate(tmp_path, model, records[:images])
    page = report(tmp_path, model, num_images=asked)
    assert [title.split(".")[0] for title in texts(page, ".//article/h4")] == shown


def test_stock_model_has_no_priors(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    model = Oracle()
    evaluate(tmp_path, model, records)
    page = report(tmp_path, model)
    assert "Prior" not in page
    assert "semantic priors" not in page
    assert "quer" not in page.split("</style>")[1]
    assert "the highest class probability of a pixel" in page
    assert texts(page, ".//figcaption")[:4] == ["Image", "Ground truth", "Prediction", "Errors"]


def test_priors_of_a_model_that_does_not_say_their_strides(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    model = OracleWithPriors()
    del model.backbone
    evaluate(tmp_path, model, records)
    captions = texts(report(tmp_path, model), ".//figcaption")
    assert [caption.split(" ·")[0] for caption in captions[4:7]] == [
        "Prior, prior2",
        "Prior, prior3",
        "Priors summed",
    ]


def test_most_confused_pairs(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    model = Oracle()
    document = evaluate(tmp_path, model, records)
    valid = np.array(document["confusion_matrix"])[:, :-1]
    np.fill_diagonal(valid, 0)
    predicted, truth = np.unravel_index(valid.argmax(), valid.shape)
    page = report(tmp_path, model)
    first = texts(page, ".//table[@class='pairs']/tbody/tr[1]/td")
    assert first[:2] == [NAMES[truth], NAMES[predicted]]
    assert first[2] == f"{100 * valid.max() / valid.sum():.1f} %"
    assert "Together 100.0 % of all wrong pixels." in page


def test_nothing_wrong(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    model = Oracle()
    evaluate(tmp_path, model, records[:1])
    assert "No pixel is wrong." in report(tmp_path, model)


def test_set_without_a_labelled_pixel(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    for record in records[:2]:
        ignored = np.full((HEIGHT, WIDTH), IGNORE, dtype=np.uint8)
        Image.fromarray(ignored).save(record["sem_seg_file_name"])
    model = Oracle()
    evaluate(tmp_path, model, records[:2])
    page = report(tmp_path, model)
    parsed(page)
    assert texts(page, ".//div[@class='value']") == ["– %"] * 5
    assert "2 images without labelled pixels are left out" in page
    assert "nan" not in page.split("</style>")[1].lower()


def test_model_is_in_its_modes_again(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    model = Oracle()
    evaluate(tmp_path, model, records)
    model.train()
    report(tmp_path, model)
    assert model.training


def test_older_page_stays_until_the_new_one_is_complete(
    tmp_path: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Oracle()
    evaluate(tmp_path, model, records)
    before = report(tmp_path, model)
    monkeypatch.setattr(Oracle, "scores", lambda self, inputs: torch.zeros(4, 2, 2))
    with pytest.raises(DataError, match=r"9\.jpg'"):
        report(tmp_path, model)
    assert (tmp_path / "report.html").read_text() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "There is no evaluation"),
        ("{", "is damaged"),
        ({"images": ...}, "lacks images"),
        ({"images": ..., "calibration": ...}, "lacks images and calibration"),
        ({"dataset": "another"}, "an evaluation of 'another'"),
        ({"images": [{"file_name": "x.jpg", "mIoU": 1, "pACC": 1}]}, "names 'x.jpg'"),
    ],
)
def test_results_that_cannot_be_reported(
    tmp_path: Path, records: list[dict[str, Any]], change: Any, message: str
) -> None:
    model = Oracle()
    document = evaluate(tmp_path, model, records)
    path = tmp_path / "sem_seg_evaluation.json"
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        document = {**document, **change}
        kept = {key: value for key, value in document.items() if value is not ...}
        path.write_text(json.dumps(kept))
    with pytest.raises(DataError, match=message):
        report(tmp_path, model)


# ---- in a browser ----


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 600, 390])
def test_browser_shows_it(tmp_path: Path, records: list[dict[str, Any]], width: int) -> None:
    model = OracleWithPriors()
    MetadataCatalog.get(NAME).stuff_colors = [
        [250, 0, 250],
        [0, 250, 250],
        [250, 250, 0],
        [9, 9, 9],
    ]
    evaluate(tmp_path, model, records, BoundaryIoU(NAMES))
    path = write_report(model, NAME, dict, str(tmp_path))
    pixels = screenshot(Path(path), width)
    assert_is_readable(pixels)
    assert count(pixels, 0x2B, 0x6C, 0xB0) > 5000  # bars of IoU
    for color in ((250, 0, 250), (0, 250, 250), (250, 250, 0)):  # maps of the classes
        assert count(pixels, *color) > 20_000
