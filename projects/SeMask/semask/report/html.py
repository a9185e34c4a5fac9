"""The report of an evaluation of semantic segmentation, as HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from semask.evaluation.calibration import CalibrationCurve
from semask.evaluation.confusion import ClassCounts, mean_iou_of_labelled_classes
from semask.report.charts import (
    NAMED_CLASSES,
    NUMBERED_CLASSES,
    confusion_chart,
    percent,
    reliability_chart,
    shade_key,
    shortened,
    spread_chart,
)
from semask.report.page import figures, header, in_percent, page, section
from semask.report.pictures import ShownImage

# More classes than this are listed in two tables side by side.
_ONE_TABLE = 24
_MOST_LEGEND_ENTRIES = 14


@dataclass(frozen=True)
class ReportData:
    """What the page shows.

    Attributes:
        title: of the page, e.g. the dataset.
        facts: short names and values for its head.
        class_names: of the K classes.
        colors: (K, 3) uint8, RGB.
        matrix: (K, K + 1) confusion matrix (see ``semask.evaluation.confusion``).
        metrics: in percent, by Detectron2's names.
        curve: the calibration of the confidences.
        spread: number of images in each of equal ranges of mIoU.
        unscored: number of images without any labelled pixel.
        worst, best: the shown images.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    class_names: Sequence[str]
    colors: np.ndarray
    matrix: np.ndarray
    metrics: Mapping[str, float]
    curve: CalibrationCurve
    spread: np.ndarray
    unscored: int
    worst: Sequence[ShownImage]
    best: Sequence[ShownImage]


def render_page(data: ReportData) -> str:
    """The whole page."""
    sections = [_head(data), _classes(data), _confusions(data), _images(data), _calibration(data)]
    return page(f"{data.title} · segmentation report", sections)


def _head(data: ReportData) -> str:
    tiles = [
        ("mIoU", in_percent(data.metrics["mIoU"]), "mean IoU of the classes"),
        ("pACC", in_percent(data.metrics["pACC"]), "pixels that are right"),
        ("mACC", in_percent(data.metrics["mACC"]), "mean accuracy of the classes"),
        ("fwIoU", in_percent(data.metrics["fwIoU"]), "IoU weighted by frequency"),
    ]
    if "mBoundaryIoU" in data.metrics:
        boundary = in_percent(data.metrics["mBoundaryIoU"])
        tiles.append(("mBoundaryIoU", boundary, "mean IoU near contours"))
    error = 100 * data.curve.expected_calibration_error
    tiles.append(("ECE", in_percent(error), "expected calibration error"))
    return header("Segmentation report", data.title, data.facts, tiles)


def _classes(data: ReportData) -> str:
    counts = ClassCounts.of(data.matrix)
    iou, accuracy = counts.iou, counts.accuracy
    share = counts.labelled / max(counts.labelled.sum(), 1)
    # Absent ones last; the sort keeps the dataset's order among equals.
    order = np.argsort(-np.nan_to_num(iou, nan=-1), kind="stable")
    mean = data.metrics["mIoU"]
    mark = "" if np.isnan(mean) else f'<i style="left:{mean:.2f}%"></i>'
    numbered = len(data.class_names) > NAMED_CLASSES
    has_boundary = "mBoundaryIoU" in data.metrics
    rows = []
    for index in order:
        name = data.class_names[index]
        width = 100 * np.nan_to_num(iou[index])
        number = f'<span class="index">{index}</span>' if numbered else ""
        boundary = ""
        if has_boundary:
            boundary = f"<td>{in_percent(data.metrics[f'BoundaryIoU-{name}'])}</td>"
        rows.append(
            f'<tr><th scope="row">{number}{_named(data, index)}</th>'
            f'<td class="track"><div><b style="width:{width:.2f}%"></b>{mark}</div></td>'
            f"<td><strong>{in_percent(100 * iou[index])}</strong></td>{boundary}"
            f"<td>{in_percent(100 * accuracy[index])}</td><td>{percent(share[index])}</td></tr>"
        )
    boundary = "<th>Boundary IoU</th>" if has_boundary else ""
    head = (
        '<thead><tr><th scope="col">Class</th><th></th><th>IoU</th>'
        f"{boundary}<th>Accuracy</th><th>Pixels</th></tr></thead>"
    )
    half = len(rows) if len(rows) <= _ONE_TABLE else -(-len(rows) // 2)
    tables = "".join(
        f'<table class="bars">{head}<tbody>{"".join(rows[start : start + half])}</tbody></table>'
        for start in range(0, len(rows), half)
    )
    notes = [
        "IoU is the share of pixels that are right among those that are of the class in the "
        "ground truth, the prediction or both. The line marks mIoU."
    ]
    if (absent := int((counts.union == 0).sum())) > 0:
        notes.append(f"Classes without any pixel in ground truth and prediction: {absent}.")
    if ((counts.labelled == 0) & (counts.predicted > 0)).any():
        other = in_percent(mean_iou_of_labelled_classes(data.matrix))
        notes.append(
            "Classes that are predicted but absent from the ground truth count in mIoU with 0; "
            f"over the classes of the ground truth alone the mean is {other} %."
        )
    return section("Classes", " ".join(notes), f'<div class="columns">{tables}</div>')


def _confusions(data: ReportData) -> str:
    valid = data.matrix[:, :-1].T.astype(np.float64)  # rows: ground truth
    labelled = valid.sum(axis=1, keepdims=True)
    shares = np.divide(valid, labelled, out=np.full(valid.shape, np.nan), where=labelled > 0)
    wrong = valid.copy()
    np.fill_diagonal(wrong, 0)
    count = 12 if len(data.class_names) <= NAMED_CLASSES else 24
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(cell), len(wrong)) for cell in order]
    pairs = [pair for pair in pairs if wrong[pair] > 0]
    total = max(wrong.sum(), 1)
    rows = "".join(
        f"<tr><td>{_named(data, truth)}</td><td>{_named(data, other)}</td>"
        f"<td>{percent(wrong[truth, other] / total)}</td>"
        f"<td>{percent(shares[truth, other])}</td></tr>"
        for truth, other in pairs
    )
    if pairs:
        covered = percent(sum(wrong[pair] for pair in pairs) / total)
        table = (
            '<table class="pairs"><thead><tr><th scope="col">Ground truth</th>'
            '<th scope="col">predicted as</th><th>of all errors</th><th>of the true class</th>'
            f"</tr></thead><tbody>{rows}</tbody></table>"
            f'<p class="note">Together {covered} of all wrong pixels.</p>'
        )
    else:
        table = '<p class="note">No pixel is wrong.</p>'
    numbers = "" if len(shares) <= NAMED_CLASSES else " Numbers are those of the table above."
    note = (
        "What became of the pixels of each true class: every row of the matrix adds up to 100 "
        f"percent, its diagonal is right.{numbers}"
    )
    chart = confusion_chart(shares, data.class_names) + f'<div class="key">{shade_key()}</div>'
    # Names without numbers need the page's width to be read.
    kind = "stack" if NUMBERED_CLASSES < len(shares) <= NAMED_CLASSES else "columns"
    content = f'<div class="{kind}"><div>{chart}</div><div>{table}</div></div>'
    return section("Confusions", note, content)


def _images(data: ReportData) -> str:
    unscored = (
        f" {data.unscored} images without a labelled pixel are left out." if data.unscored else ""
    )
    priors = ""
    if any(image.priors for image in (*data.worst, *data.best)):
        priors = (
            " Below them: what the semantic priors of the backbone's stages say, before any "
            "decoder."
        )
    note = (
        "An image's mIoU is the mean over the classes in its ground truth. The pictures were "
        f"predicted once more for this page.{priors}{unscored}"
    )
    groups = "".join(
        f"<h3>{title}</h3>{''.join(_card(image, data) for image in images)}"
        for title, images in (("Worst", data.worst), ("Best", data.best))
        if images
    )
    return section("Images", note, f"{spread_chart(data.spread)}{groups}")


def _card(image: ShownImage, data: ReportData) -> str:
    ratio = f"{image.size[0]} / {image.size[1]}"
    legend = "".join(
        f"<span>{_named(data, index)}</span>" for index in image.classes[:_MOST_LEGEND_ENTRIES]
    )
    if (more := len(image.classes) - _MOST_LEGEND_ENTRIES) > 0:
        legend += f"<span>and {more} more</span>"
    priors = figures(image.priors, ratio, "priors") if image.priors else ""
    return (
        f'<article><h4>{escape(image.name)} <span class="scores">'
        f"mIoU {in_percent(image.scores['mIoU'])} % · pixel accuracy "
        f"{in_percent(image.scores['pACC'])} %</span></h4>"
        f'{figures(image.pictures, ratio, "pictures")}{priors}<p class="legend">{legend}</p>'
        "</article>"
    )


def _calibration(data: ReportData) -> str:
    curve = data.curve
    gap = curve.overconfidence
    if np.isnan(gap):
        verdict = "No pixel has been evaluated."
    else:
        tendency = "more" if gap > 0 else "less"
        verdict = (
            f"On average the model is {percent(abs(gap))} {tendency} confident than it is "
            f"right; the expected calibration error is "
            f"{percent(curve.expected_calibration_error, 2)}."
        )
    note = (
        "Whether the confidence, the highest class probability of a pixel, says how often the "
        "pixel is right. Bars are the accuracy of the pixels in a range of confidence, orange is "
        f"the gap to their confidence, the dashed line is perfect calibration. {verdict}"
    )
    bins = len(curve.pixels)
    rows = "".join(
        f"<tr><td>{index / bins:.2f} – {(index + 1) / bins:.2f}</td><td>{percent(share, 2)}</td>"
        f"<td>{percent(confidence)}</td><td>{percent(accuracy)}</td></tr>"
        for index, (share, confidence, accuracy) in enumerate(
            zip(
                curve.pixels / max(curve.pixels.sum(), 1),
                curve.mean_confidence,
                curve.accuracy,
                strict=True,
            )
        )
        if share > 0
    )
    table = (
        '<table><thead><tr><th scope="col">Range of confidence</th><th>Pixels</th>'
        f"<th>Mean confidence</th><th>Accuracy</th></tr></thead><tbody>{rows}</tbody></table>"
    )
    chart = reliability_chart(curve)
    return section(
        "Calibration", note, f'<div class="columns"><div>{chart}</div><div>{table}</div></div>'
    )


def _named(data: ReportData, index: int) -> str:
    """The colour and the name of a class."""
    red, green, blue = (int(part) for part in data.colors[index])
    name = data.class_names[index]
    return (
        f'<span title="{escape(name)}"><span class="swatch" '
        f'style="background:rgb({red},{green},{blue})"></span>{escape(shortened(name))}</span>'
    )
