"""The charts of the evaluation report, as SVG elements that need nothing from outside."""

import math
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from semask.evaluation.calibration import CalibrationCurve

# Up to so many classes the confusion matrix names each row and column,
NAMED_CLASSES = 40
# and up to so many it has the number in each cell.
NUMBERED_CLASSES = 14

INK = "#1d2430"
FAINT = "#5b6675"
RULE = "#d5dbe3"
BLUE = "#2b6cb0"
GAP = "#f3a65f"
# From light to dark in one hue, so that it reads the same without colour vision and in print.
_SHADES = ((246, 249, 253), (198, 219, 240), (107, 170, 214), (36, 110, 178), (8, 44, 100))
_LEVELS = 24


def shade(share: float) -> str:
    """The colour of a share in 0..1. Shares grow with the square of the way along the scale, so
    that a few percent can be told from none."""
    position = math.sqrt(min(max(share, 0.0), 1.0)) * (len(_SHADES) - 1)
    low = min(int(position), len(_SHADES) - 2)
    parts = zip(_SHADES[low], _SHADES[low + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (position - low)) for a, b in parts)
    return f"#{red:02x}{green:02x}{blue:02x}"


def percent(share: float, digits: int = 1) -> str:
    """0.4212 as "42.1 %"; an en dash where there is nothing to say."""
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def confusion_chart(shares: np.ndarray, names: Sequence[str]) -> str:
    """A heat map: rows are the ground truth, columns the prediction.

    Args:
        shares: (K, K), the share of the row's pixels that was predicted as the column's class;
            NaN in rows without ground truth.
        names: of the K classes.
    """
    draw = _named_matrix if len(names) <= NAMED_CLASSES else _compact_matrix
    return draw(shares, names)


def shade_key() -> str:
    """What the colours of the confusion matrix mean."""
    ticks = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
    width = 300
    steps = "".join(
        f'<rect x="{10 + width * i / 60:.1f}" y="0" width="{width / 60 + 0.5:.1f}" height="12" '
        f'fill="{shade((i / 59) ** 2)}"/>'
        for i in range(60)
    )
    marks = "".join(
        _text(10 + width * math.sqrt(tick), 27, f"{100 * tick:.0f}", anchor="middle", size=11)
        for tick in ticks
    )
    title = "Colour scale in percent of the true class's pixels"
    return _svg(width + 20, 32, title, steps + marks, max_width=width + 20)


def reliability_chart(curve: CalibrationCurve) -> str:
    """Accuracy over confidence, the diagonal of a calibrated model, and where the pixels are."""
    left, top, side, strip = 58, 12, 380, 70
    bins = len(curve.pixels)
    width = side / bins
    parts = list(_grid(left, top, side, side, [0, 0.25, 0.5, 0.75, 1], vertical=True))
    shares = curve.pixels / max(curve.pixels.sum(), 1)
    base, strip_base = top + side, top + side + 52 + strip
    highest = max(shares.max(), 1e-9)
    bars = zip(curve.accuracy, curve.mean_confidence, shares, strict=True)
    for index, (accuracy, confidence, share) in enumerate(bars):
        if math.isnan(accuracy):
            continue
        x = left + index * width
        label = (
            f"Confidence {index / bins:.2f} to {(index + 1) / bins:.2f}: {percent(share)} of the "
            f"pixels, mean confidence {percent(confidence)}, accuracy {percent(accuracy)}"
        )
        low, high = sorted((accuracy, confidence))
        parts.append(
            f"<g><title>{label}</title>"
            + _bar(x + 1, base - side * accuracy, width - 2, side * accuracy, BLUE)
            + _bar(x + 1, base - side * high, width - 2, side * (high - low), GAP)
            + _bar(x + 1, base - side * accuracy - 1.5, width - 2, 3, INK)
            + _bar(
                x + 1,
                strip_base - strip * share / highest,
                width - 2,
                strip * share / highest,
                "#8a97a8",
            )
            + "</g>"
        )
    parts.append(
        f'<line x1="{left}" y1="{base}" x2="{left + side}" y2="{top}" stroke="{INK}" '
        'stroke-width="1.5" stroke-dasharray="5 4"/>'
    )
    parts.append(_text(left + side / 2, base + 36, "confidence", anchor="middle"))
    parts.append(_text(16, top + side / 2, "accuracy", anchor="middle", turn=-90))
    parts.append(
        f'<line x1="{left}" y1="{strip_base}" x2="{left + side}" y2="{strip_base}" '
        f'stroke="{RULE}"/>'
    )
    parts.append(_text(left - 8, strip_base - strip + 8, percent(highest, 0), anchor="end"))
    parts.append(_text(left - 8, strip_base, "0", anchor="end"))
    parts.append(_text(16, strip_base - strip / 2, "pixels", anchor="middle", turn=-90))
    title = (
        "Reliability diagram: expected calibration error "
        f"{percent(curve.expected_calibration_error, 2)}"
    )
    return _svg(left + side + 14, strip_base + 8, title, "".join(parts), max_width=520)


def spread_chart(counts: np.ndarray, score: str = "mIoU") -> str:
    """How many images have which score.

    Args:
        counts: number of images in each of equal ranges from 0 to 100 percent.
        score: what it is called.
    """
    left, top, width, height = 46, 12, 620, 120
    highest = max(int(counts.max()), 1)
    step = width / len(counts)
    base = top + height
    parts = [
        f'<line x1="{left}" y1="{base}" x2="{left + width}" y2="{base}" stroke="{FAINT}"/>',
        _text(left - 8, top + 8, str(highest), anchor="end"),
        _text(left - 8, base, "0", anchor="end"),
        _text(16, top + height / 2, "images", anchor="middle", turn=-90),
        _text(left + width / 2, base + 34, f"{score} of the image, percent", anchor="middle"),
    ]
    for index, count in enumerate(counts):
        low, high = 100 * index / len(counts), 100 * (index + 1) / len(counts)
        size = height * count / highest
        parts.append(
            f"<g><title>{score} {low:.0f} to {high:.0f} percent: {count} images</title>"
            + _bar(left + index * step + 1, base - size, step - 2, size, BLUE)
            + "</g>"
        )
    for tick in range(0, 101, 20):
        parts.append(_text(left + width * tick / 100, base + 16, str(tick), anchor="middle"))
    return _svg(
        left + width + 16, base + 42, f"Images by their {score}", "".join(parts), max_width=700
    )


def _named_matrix(shares: np.ndarray, names: Sequence[str]) -> str:
    count = len(names)
    cell = 38 if count <= NUMBERED_CLASSES else 20
    longest = max(len(name) for name in names)
    left = min(210, 40 + 7 * longest)
    top = min(160, 24 + 5 * longest)
    parts = []
    for row, name in enumerate(names):
        middle = (row + 0.5) * cell
        parts.append(_text(left - 8, top + middle + 4, shortened(name), anchor="end"))
        parts.append(_text(left + middle, top - 8, shortened(name), turn=-50))
        for column, other in enumerate(names):
            share = float(shares[row, column])
            x, y = left + column * cell, top + row * cell
            if math.isnan(share):
                parts.append(_cell(x, y, cell, "#ffffff", f"{name}: not in the ground truth"))
                continue
            parts.append(
                _cell(x, y, cell, shade(share), f"{name} predicted as {other}: {percent(share, 2)}")
            )
            if count <= NUMBERED_CLASSES and share >= 0.005:
                ink = "#ffffff" if share > 0.35 else INK
                number = f"{100 * share:.0f}"
                middle = cell / 2
                parts.append(_text(x + middle, y + middle + 4, number, anchor="middle", color=ink))
    side = count * cell
    # The turned names of the last columns lean out to the right.
    width = left + side + 0.65 * (top - 24) + 12
    parts.append(_text(left + side / 2, top + side + 22, "prediction", anchor="middle"))
    parts.append(_text(12, top + side / 2, "ground truth", anchor="middle", turn=-90))
    return _svg(width, top + side + 30, _MATRIX_TITLE, "".join(parts), max_width=width * 1.1)


def _compact_matrix(shares: np.ndarray, names: Sequence[str]) -> str:
    """Without names, and one path for all cells of about the same share: small however many."""
    count = len(names)
    left, top, side = 52.0, 12.0, 600.0
    cell = side / count
    levels = np.ceil(np.sqrt(np.nan_to_num(shares)) * _LEVELS).astype(int)
    parts = [
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="{shade(0)}" '
        f'stroke="{RULE}"/>'
    ]
    parts.append(f'<g transform="translate({left} {top}) scale({cell:.5f})">')
    for level in range(1, _LEVELS + 1):
        cells = np.argwhere(levels == level)
        path = "".join(f"M{column} {row}h1v1h-1z" for row, column in cells)
        if path:
            parts.append(f'<path fill="{shade((level / _LEVELS) ** 2)}" d="{path}"/>')
    parts.append("</g>")
    step = 10 if count <= 200 else 50
    for index in range(0, count, step):
        at = (index + 0.5) * cell
        parts.append(_text(left - 6, top + at + 4, str(index), anchor="end", size=11))
        parts.append(_text(left + at, top + side + 15, str(index), anchor="middle", size=11))
    parts.append(_text(left + side / 2, top + side + 34, "prediction", anchor="middle"))
    parts.append(_text(14, top + side / 2, "ground truth", anchor="middle", turn=-90))
    return _svg(left + side + 10, top + side + 42, _MATRIX_TITLE, "".join(parts), max_width=680)


_MATRIX_TITLE = "Confusion matrix: rows are the ground truth, columns the prediction"


def _grid(
    left: float, top: float, width: float, height: float, ticks: Sequence[float], vertical: bool
) -> Iterator[str]:
    """Lines and numbers of two axes from 0 to 1."""
    for tick in ticks:
        y, x = top + height * (1 - tick), left + width * tick
        yield f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" stroke="{RULE}"/>'
        yield _text(left - 8, y + 4, f"{tick:g}", anchor="end")
        if vertical:
            yield f'<line x1="{x}" y1="{top}" x2="{x}" y2="{top + height}" stroke="{RULE}"/>'
            yield _text(x, top + height + 17, f"{tick:g}", anchor="middle")


def _cell(x: float, y: float, side: float, color: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{side}" height="{side}" fill="{color}" '
        f'stroke="#ffffff"><title>{escape(title)}</title></rect>'
    )


def _bar(x: float, y: float, width: float, height: float, color: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 12,
    color: str = FAINT,
    turn: int = 0,
) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{color}"{turned}>{escape(text)}</text>'
    )


def shortened(name: str, length: int = 26) -> str:
    """A name that is cut off where it is too long."""
    return name if len(name) <= length else name[: length - 1] + "…"


def _svg(width: float, height: float, title: str, content: str, *, max_width: float) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{max_width:.0f}px"><title>{escape(title)}</title>{content}</svg>'
    )
