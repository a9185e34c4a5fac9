"""The charts of the evaluation reports, as self-contained SVG elements.

Curves and bars are drawn by matplotlib. The confusion matrix is a template: in matplotlib its cells
have no tooltips, and for 150 classes it takes 3.7 MB instead of 0.3 MB.
"""

import functools
import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from markupsafe import Markup

from semask.evaluation.calibration import CalibrationCurve
from semask.report.page import percent, render, truncated

if TYPE_CHECKING:
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

Drawing = ParamSpec("Drawing")

# Up to this number of classes the confusion matrix names each row and column.
NAMED_CLASSES = 40
# Up to this number of classes it shows the value in each cell.
NUMBERED_CLASSES = 14

INK = "#1d2430"
FAINT = "#5b6675"
RULE = "#d5dbe3"
BLUE = "#2b6cb0"
GREY = "#8a97a8"
GAP = "#f3a65f"
# One hue from light to dark, readable without colour vision and in print.
SHADES = ("#f6f9fd", "#c6dbf0", "#6baad6", "#246eb2", "#082c64")
_LEVELS = 24
# Sizes are in CSS pixels: one pixel is one point in matplotlib's SVG.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text, not paths
    "font.size": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "axes.axisbelow": True,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 7,
    "grid.color": RULE,
}


def _styled(draw: Callable[Drawing, Markup]) -> Callable[Drawing, Markup]:
    """Decorate a function to draw in the style of the page.

    matplotlib takes 30 MiB and only one process of a run draws, so it is imported on first use.
    """

    @functools.wraps(draw)
    def drawn(*args: Drawing.args, **kwargs: Drawing.kwargs) -> Markup:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


@_styled
def reliability_chart(curve: CalibrationCurve) -> Markup:
    """Accuracy over confidence, the diagonal of a calibrated model, and the share of pixels per
    bin.
    """
    figure = _figure(410, 500)
    upper, lower = figure.subplots(2, 1, height_ratios=(5, 1))
    bins = len(curve.pixels)
    shares = curve.pixels / max(curve.pixels.sum(), 1)
    seen = np.flatnonzero(curve.pixels > 0)
    accuracy, confidence = curve.accuracy[seen], curve.mean_confidence[seen]
    labels = [
        f"Confidence {index / bins:.2f} to {(index + 1) / bins:.2f}: {percent(shares[index])} of "
        f"the pixels, mean confidence {percent(curve.mean_confidence[index])}, accuracy "
        f"{percent(curve.accuracy[index])}"
        for index in seen
    ]
    left, width = (seen + 0.05) / bins, 0.9 / bins
    drawn = [upper.bar(left, accuracy, width, align="edge", color=BLUE)]
    low, high = np.minimum(accuracy, confidence), np.maximum(accuracy, confidence)
    drawn.append(upper.bar(left, high - low, width, bottom=low, align="edge", color=GAP))
    upper.hlines(accuracy, left, left + width, color=INK, linewidth=3)
    upper.plot([0, 1], [0, 1], color=INK, linewidth=1.5, linestyle=(0, (5 / 1.5, 4 / 1.5)))
    ticks = (0, 0.25, 0.5, 0.75, 1)
    names = [f"{tick:g}" for tick in ticks]
    upper.set_xticks(ticks, names)
    upper.set_yticks(ticks, names)
    upper.grid(True)
    upper.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")

    highest = max(float(shares.max()), 1e-9)
    drawn.append(lower.bar(left, shares[seen], width, align="edge", color=GREY))
    lower.set_xticks([])
    lower.set_yticks([0, highest], ["0", percent(highest, 0)])
    lower.set(xlim=(0, 1), ylim=(0, highest), ylabel="pixels")
    error = percent(curve.expected_calibration_error, 2)
    return _inline(
        figure,
        f"Reliability diagram: expected calibration error {error}",
        _titles(drawn, labels),
        max_width=520,
    )


@_styled
def score_histogram(counts: np.ndarray, score: str = "mIoU") -> Markup:
    """A histogram of the images' scores.

    Args:
        counts: number of images in each of several equal ranges from 0 to 100 percent.
        score: its name.
    """
    figure = _figure(430, 150)
    axes = figure.subplots()
    edges = np.linspace(0, 100, len(counts) + 1)
    step = edges[1]
    bars = axes.bar(edges[:-1] + 0.05 * step, counts, 0.9 * step, align="edge", color=BLUE)
    highest = max(int(counts.max()), 1)
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks([0, highest])
    axes.set(xlim=(0, 100), ylim=(0, highest))
    axes.set(xlabel=f"{score} of the image, percent", ylabel="images")
    labels = [
        f"{score} {low:.0f} to {low + step:.0f} percent: {count} images"
        for low, count in zip(edges[:-1], counts, strict=True)
    ]
    return _inline(figure, f"Images by their {score}", _titles([bars], labels), max_width=520)


def histogram_values(images: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Template values: the histogram of the images' scores, and the number of unscored images.

    Args:
        images: entries of the result file.
        metric: their score in percent; None = not scored.
    """
    scores = [image[metric] for image in images if image[metric] is not None]
    counts = np.histogram(scores, bins=20, range=(0, 100))[0]
    return {"histogram": score_histogram(counts, metric), "unscored": len(images) - len(scores)}


def confusion_chart(shares: np.ndarray, names: Sequence[str]) -> Markup:
    """A heat map: rows are the ground truth, columns the prediction.

    Args:
        shares: (K, K), the share of the row's pixels that was predicted as the column's class;
            NaN in rows without ground truth.
        names: of the K classes.
    """
    count = len(names)
    if count > NAMED_CLASSES:
        values = _compact_matrix(shares)
    else:
        step = 38 if count <= NUMBERED_CLASSES else 20
        longest = max(len(name) for name in names)
        left, top = min(210, 40 + 7 * longest), min(160, 24 + 5 * longest)
        side = count * step
        values = {
            "step": step,
            "left": left,
            "top": top,
            "side": side,
            # The rotated names of the last columns extend to the right.
            "width": left + side + 0.65 * (top - 24) + 12,
            "height": top + side + 30,
            "cells": _cells(shares, names),
            "levels": [],
            "labels": [(index, truncated(name)) for index, name in enumerate(names)],
            "turned": True,
        }
    return Markup(render("matrix.svg.j2", ground=shade(0), **values))


def shade(share: float) -> str:
    """The colour of a share in 0..1. The position on the scale is the square root of the share, so
    that a few percent differ visibly from none.
    """
    position = shade_position(share) * (len(SHADES) - 1)
    first = min(int(position), len(SHADES) - 2)
    low, high = (bytes.fromhex(color[1:]) for color in SHADES[first : first + 2])
    mixed = (round(a + (b - a) * (position - first)) for a, b in zip(low, high, strict=True))
    return f"#{bytes(mixed).hex()}"


def shade_position(share: float) -> float:
    """The position on the scale of ``SHADES``, 0..1, of a share, 0..1."""
    return math.sqrt(min(max(share, 0.0), 1.0))


def _cells(shares: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    cells = []
    for (row, column), share in np.ndenumerate(shares):
        cell = {"row": row, "column": column, "number": "", "ink": INK}
        if math.isnan(share):
            cell |= {"color": "#ffffff", "title": f"{names[row]}: not in the ground truth"}
        else:
            title = f"{names[row]} predicted as {names[column]}: {percent(share, 2)}"
            cell |= {"color": shade(share), "title": title}
            if len(names) <= NUMBERED_CLASSES and share >= 0.005:
                cell |= {"number": f"{100 * share:.0f}", "ink": "#ffffff" if share > 0.35 else INK}
        cells.append(cell)
    return cells


def _compact_matrix(shares: np.ndarray) -> dict[str, Any]:
    """The matrix with indices instead of names, and one path for all cells of a similar share."""
    count = len(shares)
    side = 600
    levels = np.ceil(np.sqrt(np.nan_to_num(shares)) * _LEVELS).astype(int)
    paths = [
        (
            shade((level / _LEVELS) ** 2),
            "".join(f"M{column} {row}h1v1h-1z" for row, column in np.argwhere(levels == level)),
        )
        for level in range(1, _LEVELS + 1)
    ]
    return {
        "step": side / count,
        "left": 54,
        "top": 12,
        "side": side,
        "width": 54 + side + 10,
        "height": 12 + side + 44,
        "cells": [],
        "levels": [(color, path) for color, path in paths if path],
        "labels": [(index, str(index)) for index in range(0, count, 10 if count <= 200 else 50)],
        "turned": False,
    }


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # see _styled

    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def _titles(groups: "Iterable[BarContainer]", labels: Sequence[str]) -> dict[str, str]:
    """Set an id on each bar; returns the labels by id."""
    titles = {}
    for number, bars in enumerate(groups):
        for index, (bar, label) in enumerate(zip(bars, labels, strict=True)):
            bar.set_gid(f"bar-{number}-{index}")
            titles[f"bar-{number}-{index}"] = label
    return titles


def _inline(figure: "Figure", title: str, titles: Mapping[str, str], *, max_width: int) -> Markup:
    """A figure as an SVG element of the page, identical for identical values.

    Args:
        figure: must not need clipping.
        title: of the figure.
        titles: tooltips of elements, by their ids.
        max_width: in CSS pixels.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    for element in list(root.iter()):
        # All figures of a page share one namespace of ids, so they get prefixes.
        element.tag = element.tag.rpartition("}")[2]
        for name in ("id", "clip-path"):
            value = element.attrib.pop(name, "")
            if value in titles:
                _set_title(element, titles[value])
        if element.tag == "text":
            element.attrib["style"] = _without_font(element.attrib["style"])
        elif element.tag == "path":
            element.attrib["d"] = " ".join(element.attrib["d"].split())
        for child in list(element):
            if child.tag.rpartition("}")[2] in ("metadata", "defs"):
                element.remove(child)
        element.tail = None
        if element.text is not None and not element.text.strip():
            element.text = None
    root.attrib = {
        "role": "img",
        "viewBox": root.attrib["viewBox"],
        "style": f"max-width:{max_width}px",
    }
    _set_title(root, title)
    return Markup(ET.tostring(root, encoding="unicode"))


def _set_title(element: ET.Element, text: str) -> None:
    title = ET.Element("title")
    title.text = text
    element.insert(0, title)


def _without_font(style: str) -> str:
    """The style of a text without its font family, so that the page's applies; the size is kept."""
    kept = [
        part.strip()
        for part in style.split(";")
        if part.split(":")[0].strip() not in ("font", "font-family", "font-size")
    ]
    size = next(word for word in style.replace(";", " ").split() if word.endswith("px"))
    return "; ".join([f"font-size: {size}", *kept])
