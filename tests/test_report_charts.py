"""The charts of the evaluation report."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np

from semask.evaluation import (
    CalibrationCurve,
)
from semask.report import charts as report_charts


def test_confusion_of_few_classes_names_and_numbers_them() -> None:
    shares = np.array([[0.9, 0.1], [np.nan, np.nan]])
    chart = ET.fromstring(report_charts.confusion_chart(shares, ["a < b", "c"]))
    labels = [element.text for element in chart.iter("text")]
    assert labels.count("a < b") == 2
    assert {"90", "10", "prediction", "ground truth"} <= set(labels)
    titles = {element.text for element in chart.iter("title")}
    assert {"a < b predicted as c: 10.00 %", "c: not in the ground truth"} <= titles


def test_confusion_of_many_classes_stays_small() -> None:
    shares = np.random.default_rng(0).dirichlet(np.full(150, 0.05), 150)
    text = report_charts.confusion_chart(shares, [f"class {index}" for index in range(150)])
    chart = ET.fromstring(text)
    assert len(text) < 400_000
    assert "class 7" not in text
    cells = sum(path.attrib["d"].count("M") for path in chart.iter("path"))
    assert cells == (shares > 0).sum()


def test_bars_say_what_they_are() -> None:
    text = report_charts.score_histogram(np.array([0, 3, 1, 0]))
    chart = ET.fromstring(text)
    titles = [element.text for element in chart.iter("title")]
    assert titles[0] == "Images by their mIoU"
    assert titles[2] == "mIoU 25 to 50 percent: 3 images"
    assert len(titles) == 5
    labels = [element.text for element in chart.iter("text")]
    assert {"0", "20", "100", "3", "images", "mIoU of the image, percent"} <= set(labels)
    assert text == report_charts.score_histogram(np.array([0, 3, 1, 0]))


def test_reliability_of_each_range_of_confidence() -> None:
    curve = CalibrationCurve(np.array([0, 6, 2]), np.array([0, 3, 2]), np.array([0, 3.3, 1.7]))
    text = report_charts.reliability_chart(curve)
    chart = ET.fromstring(text)
    assert chart.attrib["role"] == "img"
    titles = [element.text for element in chart.iter("title")]
    error = curve.expected_calibration_error
    assert titles[0] == f"Reliability diagram: expected calibration error {100 * error:.2f} %"
    label = "75.0 % of the pixels, mean confidence 55.0 %, accuracy 50.0 %"
    assert titles.count(f"Confidence 0.33 to 0.67: {label}") == 3  # accuracy, gap, and pixels
    assert len(titles) == 1 + 2 * 3  # a range without pixels has no bars
    assert text == report_charts.reliability_chart(curve)
    # Text stays text in the page's font, and nothing refers to anything by an identifier.
    assert all("font-family" not in element.attrib["style"] for element in chart.iter("text"))
    assert not {name for element in chart.iter() for name in element.attrib} & {"id", "href"}


def test_text_is_legible_on_a_phone() -> None:
    """At a width of 360 pixels, in which wide matrices scroll."""
    curve = CalibrationCurve(np.array([1, 1]), np.array([1, 0]), np.array([0.4, 0.9]))
    shares = np.eye(60)
    charts = [report_charts.score_histogram(np.ones(20)), report_charts.reliability_chart(curve)]
    charts += [
        report_charts.confusion_chart(shares[:count, :count], ["a name"] * count)
        for count in (2, 14, 40, 60)
    ]
    for chart in charts:
        root = ET.fromstring(chart)
        width = float(root.attrib["viewBox"].split()[2])
        at_least = re.search(r"--legible:(\d+)px", root.attrib["style"])
        scale = max(360, int(at_least[1]) if at_least else 0) / width
        for element in root.iter("text"):
            found = re.search(r"font-size: ([\d.]+)px", element.attrib.get("style", ""))
            size = float(found[1] if found else element.attrib["font-size"])
            assert scale * size >= 10


def test_shades_darken_steadily() -> None:
    def luminance(share: float) -> float:
        color = report_charts.shade(share)
        red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    values = [luminance(share) for share in np.linspace(0, 1, 101)]
    assert all(after < before for before, after in itertools.pairwise(values))
    assert luminance(0) - luminance(0.01) > 5  # one percent can be seen
