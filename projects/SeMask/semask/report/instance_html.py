"""The report of an evaluation of instances, as HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from semask.report.charts import shortened, spread_chart
from semask.report.instance_pictures import ShownInstances
from semask.report.page import figures, header, in_percent, page, section

TASKS = {"segm": "Mask", "bbox": "Box"}
# More categories than this are listed in two tables side by side.
_ONE_TABLE = 24
_MOST_LEGEND_ENTRIES = 14


@dataclass(frozen=True)
class InstanceReportData:
    """What the page shows.

    Attributes:
        title: of the page, e.g. the dataset.
        facts: short names and values for its head.
        categories: their names.
        results: in percent, by Detectron2's names: {"bbox": {"AP": ..., "AP-name": ...}, ...}.
        spread: number of images in each of equal ranges of F1.
        unscored: number of images in which nothing is and nothing was found.
        worst, best: the shown images.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    categories: Sequence[str]
    results: Mapping[str, Mapping[str, float]]
    spread: np.ndarray
    unscored: int
    worst: Sequence[ShownInstances]
    best: Sequence[ShownInstances]


def render_instance_page(data: InstanceReportData) -> str:
    """The whole page."""
    return page(f"{data.title} · instance report", [_head(data), _categories(data), _images(data)])


def _head(data: InstanceReportData) -> str:
    notes = {"AP": "mean over IoU 0.50 to 0.95", "AP50": "at IoU 0.50", "AP75": "at IoU 0.75"}
    tiles = [
        (f"{name} {metric}", in_percent(data.results[task][metric]), note)
        for task, name in TASKS.items()
        if task in data.results
        for metric, note in notes.items()
    ]
    panoptic = data.results.get("panoptic_seg")
    if panoptic is not None:
        tiles.insert(0, ("PQ", in_percent(panoptic["PQ"]), "panoptic quality"))
    return header("Instance report", data.title, data.facts, tiles)


def _categories(data: InstanceReportData) -> str:
    tasks = [task for task in TASKS if task in data.results]
    values = {task: category_ap(data.results[task], data.categories) for task in tasks}
    # Absent ones last; the sort keeps the dataset's order among equals.
    order = np.argsort(-np.nan_to_num(values[tasks[0]], nan=-1), kind="stable")
    rows = []
    for index in order:
        cells = "".join(
            f'<td class="track"><div><b style="width:{np.nan_to_num(values[task][index]):.2f}%">'
            f"</b>{_mark(data.results[task]['AP'])}</div></td>"
            f"<td><strong>{in_percent(values[task][index])}</strong></td>"
            for task in tasks
        )
        name = data.categories[index]
        rows.append(
            f'<tr><th scope="row" title="{escape(name)}">{escape(shortened(name))}</th>{cells}</tr>'
        )
    head = "".join(f"<th></th><th>{TASKS[task]} AP</th>" for task in tasks)
    head = f'<thead><tr><th scope="col">Category</th>{head}</tr></thead>'
    half = len(rows) if len(rows) <= _ONE_TABLE else -(-len(rows) // 2)
    tables = "".join(
        f'<table class="bars">{head}<tbody>{"".join(rows[start : start + half])}</tbody></table>'
        for start in range(0, len(rows), half)
    )
    note = (
        "Average precision, by COCO's definition. The line marks the mean over the categories; "
        "a dash: there is none in the ground truth."
    )
    return section("Categories", note, f'<div class="columns">{tables}{_sizes(data, tasks)}</div>')


def _sizes(data: InstanceReportData, tasks: Sequence[str]) -> str:
    sizes = {"APs": "small (up to 32 x 32 pixels)", "APm": "medium", "APl": "large (from 96 x 96)"}
    rows = "".join(
        f'<tr><th scope="row">{words}</th>'
        + "".join(f"<td>{in_percent(data.results[task][key])}</td>" for task in tasks)
        + "</tr>"
        for key, words in sizes.items()
    )
    head = "".join(f"<th>{TASKS[task]} AP</th>" for task in tasks)
    return (
        f'<table><thead><tr><th scope="col">Instances</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _mark(mean: float) -> str:
    return "" if np.isnan(mean) else f'<i style="left:{mean:.2f}%"></i>'


def category_ap(results: Mapping[str, float], categories: Sequence[str]) -> np.ndarray:
    """AP of each category in percent; NaN where it has none."""
    if len(categories) == 1:  # for which Detectron2 gives the mean alone
        return np.array([results["AP"]])
    return np.array([results.get(f"AP-{name}", np.nan) for name in categories])


def _images(data: InstanceReportData) -> str:
    unscored = (
        f" {data.unscored} images without an instance, in which none was found, are left out."
        if data.unscored
        else ""
    )
    priors = ""
    if any(image.priors for image in (*data.worst, *data.best)):
        priors = " Below them: what the semantic priors of the backbone's stages say."
    note = (
        "An image's F1 counts the predictions with a score of at least 0.5 that fit an instance "
        "with an IoU of at least 0.5 against false ones (blue) and missed instances (orange). The "
        f"pictures were predicted once more for this page.{priors}{unscored}"
    )
    groups = "".join(
        f"<h3>{title}</h3>{''.join(_card(image) for image in images)}"
        for title, images in (("Worst", data.worst), ("Best", data.best))
        if images
    )
    return section("Images", note, f"{spread_chart(data.spread, 'F1')}{groups}")


def _card(image: ShownInstances) -> str:
    ratio = f"{image.size[0]} / {image.size[1]}"
    scores = image.scores
    text = (
        f"F1 {in_percent(scores['F1'])} % · {scores['instances']} instances, {scores['right']} "
        f"found, {scores['missed']} missed, {scores['false']} false"
    )
    priors = ""
    if image.priors:
        shown = image.prior_classes[:_MOST_LEGEND_ENTRIES]
        legend = "".join(
            f'<span><span class="swatch" style="background:rgb({red},{green},{blue})"></span>'
            f"{escape(shortened(name))}</span>"
            for name, (red, green, blue) in shown
        )
        if (more := len(image.prior_classes) - len(shown)) > 0:
            legend += f"<span>and {more} more</span>"
        priors = f'{figures(image.priors, ratio, "priors")}<p class="legend">{legend}</p>'
    return (
        f'<article><h4>{escape(image.name)} <span class="scores">{text}</span></h4>'
        f"{figures(image.pictures, ratio, 'pictures')}{priors}</article>"
    )
