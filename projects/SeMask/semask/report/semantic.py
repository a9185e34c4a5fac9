"""The report of a semantic evaluation: ``report.html``, one self-contained file.

It is made from the result file that ``SemSegConfusionEvaluator`` writes with the metrics of
``report_metrics``. Only the few shown images are predicted again, so the evaluation needs no more
memory and little more time: the confidences and a score of each image.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from semask.errors import DataError
from semask.evaluation.calibration import Calibration, CalibrationCurve
from semask.evaluation.confusion import (
    ClassCounts,
    ImageScores,
    mean_iou_of_labelled_classes,
    ranked,
)
from semask.evaluation.metric import Metric
from semask.evaluation.sem_seg_evaluator import RESULT_FILE
from semask.inference.model_outputs import Mapper, evaluating, score_kind_of
from semask.report.charts import (
    NAMED_CLASSES,
    SHADES,
    confusion_chart,
    histogram_values,
    reliability_chart,
    shade_position,
)
from semask.report.page import (
    defined,
    modification_date,
    read_evaluation,
    worst_and_best,
    write_page,
)
from semask.report.pictures import show_image
from semask.utils.palette import class_colors

# With more classes the confusion matrix is too wide to be read beside another column.
_HALF_WIDTH_CLASSES = 8
# Ticks of its colour scale, in percent.
_SHADE_TICKS = (0, 1, 5, 10, 25, 50, 100)


def report_metrics() -> list[Metric]:
    """The metrics that ``write_report`` needs."""
    return [ImageScores(), Calibration()]


def write_report(
    model: nn.Module,
    dataset_name: str,
    mapper: Mapper,
    folder: str,
    *,
    num_images: int = 4,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Write the report of an evaluation next to its result file, atomically.

    Call it in one process only. The model's mode is restored afterwards.

    Args:
        model: the evaluated model; see ``render_panels``.
        dataset_name: the registered dataset that it was evaluated on.
        mapper: turns a dataset dict into the model's input, as in evaluation.
        folder: the folder of the evaluator's result file.
        num_images: number of the worst images to show, and of the best.
        facts: short names and values to show at the top, e.g. ("Weights", "model_final.pth").

    Returns:
        The path of the page.

    Raises:
        DataError: there is no result file, it lacks an entry, or it or an image is of another
            dataset.
    """
    source = os.path.join(folder, RESULT_FILE)
    document = read_evaluation(
        source,
        dataset_name,
        ("images", "calibration"),
        hint="Evaluate with TEST.REPORT True.",
    )
    names: list[str] = document["class_names"]
    metadata = MetadataCatalog.get(dataset_name)
    colors = class_colors(len(names), metadata.get("stuff_colors"))
    records = {record["file_name"]: record for record in DatasetCatalog.get(dataset_name)}
    groups = [
        [(_record(records, image["file_name"], source), image) for image in group]
        for group in worst_and_best(ranked(document["images"]), num_images)
    ]
    show = functools.partial(
        show_image, class_names=names, colors=colors, ignore_label=document["ignore_label"]
    )
    with evaluating(model) as model:
        worst, best = (
            [show(model, record, image, mapper) for record, image in group] for group in groups
        )
        score_kind = score_kind_of(model)
    matrix = np.array(document["confusion_matrix"], dtype=np.int64)
    metrics = {key: defined(value) for key, value in document["results"].items()}
    curve = CalibrationCurve.from_document(document["calibration"])
    return write_page(
        folder,
        "semantic.html.j2",
        title=dataset_name,
        facts=[
            ("Evaluated", modification_date(source)),
            *_facts(document["images"], matrix),
            *facts,
        ],
        tiles=_tiles(metrics, curve),
        numbered=len(names) > NAMED_CLASSES,
        **_class_values(matrix, metrics, names, colors),
        **_confusion_values(matrix, names, colors),
        **histogram_values(document["images"], "mIoU"),
        worst=worst,
        best=best,
        score_kind=score_kind,
        **_calibration_values(curve),
    )


def _record(
    records: Mapping[str, Mapping[str, Any]], file_name: str, source: str
) -> Mapping[str, Any]:
    if file_name not in records:
        raise DataError(f"'{source}' names '{file_name}', which is not an image of the dataset.")
    return records[file_name]


def _facts(images: Sequence[Any], matrix: np.ndarray) -> list[tuple[str, str]]:
    ignored = matrix[:, -1].sum() / max(matrix.sum(), 1)
    return [
        ("Images", f"{len(images):,}"),
        ("Classes", str(len(matrix))),
        ("Labelled pixels", f"{int(matrix[:, :-1].sum()):,}"),
        ("Ignored", f"{100 * ignored:.1f} %"),
    ]


def _tiles(metrics: Mapping[str, float], curve: CalibrationCurve) -> list[tuple[str, float, str]]:
    """Name, value in percent and explanation of the most important results."""
    explained = {
        "mIoU": "mean IoU of the classes",
        "pACC": "share of correct pixels",
        "mACC": "mean accuracy of the classes",
        "fwIoU": "IoU weighted by frequency",
        "mBoundaryIoU": "mean IoU near contours",
    }
    tiles = [(key, metrics[key], words) for key, words in explained.items() if key in metrics]
    error = 100 * curve.expected_calibration_error
    return [*tiles, ("ECE", error, "expected calibration error")]


def _class_values(
    matrix: np.ndarray, metrics: Mapping[str, float], names: Sequence[str], colors: np.ndarray
) -> dict[str, Any]:
    """A row for each class, highest IoU first and absent ones last, and what the means exclude."""
    counts = ClassCounts.of(matrix)
    share = counts.labelled / max(counts.labelled.sum(), 1)
    # The sort is stable: ties keep the dataset's order.
    order = np.argsort(-np.nan_to_num(counts.iou, nan=-1), kind="stable")
    return {
        "classes": [
            {
                "index": index,
                "name": names[index],
                "color": colors[index].tolist(),
                "iou": 100 * counts.iou[index],
                "boundary": metrics.get(f"BoundaryIoU-{names[index]}"),
                "accuracy": 100 * counts.accuracy[index],
                "share": share[index],
            }
            for index in order
        ],
        "mean_iou": metrics["mIoU"],
        "has_boundary": "mBoundaryIoU" in metrics,
        "absent": int((counts.union == 0).sum()),
        "only_predicted": bool(((counts.labelled == 0) & (counts.predicted > 0)).any()),
        "labelled_mean": mean_iou_of_labelled_classes(matrix),
    }


def _confusion_values(
    matrix: np.ndarray, names: Sequence[str], colors: np.ndarray
) -> dict[str, Any]:
    """The matrix by shares of the true class, and the most frequent pairs."""
    pixels = matrix[:, :-1].T.astype(np.float64)  # rows: ground truth
    labelled = pixels.sum(axis=1, keepdims=True)
    shares = np.divide(pixels, labelled, out=np.full(pixels.shape, np.nan), where=labelled > 0)
    wrong = pixels.copy()
    np.fill_diagonal(wrong, 0)
    total = max(wrong.sum(), 1)
    count = 12 if len(names) <= NAMED_CLASSES else 24
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(cell), len(names)) for cell in order]
    return {
        "matrix": confusion_chart(shares, names),
        # Names and numbers need the full width of the page to be legible.
        "matrix_needs_width": _HALF_WIDTH_CLASSES < len(names) <= NAMED_CLASSES,
        "shades": SHADES,
        "shade_ticks": [(100 * shade_position(tick / 100), tick) for tick in _SHADE_TICKS],
        "confusions": [
            {
                "truth": (names[truth], colors[truth].tolist()),
                "predicted": (names[other], colors[other].tolist()),
                "of_errors": wrong[truth, other] / total,
                "of_class": shares[truth, other],
            }
            for truth, other in pairs
            if wrong[truth, other] > 0
        ],
    }


def _calibration_values(curve: CalibrationCurve) -> dict[str, Any]:
    number = len(curve.pixels)
    shares = curve.pixels / max(curve.pixels.sum(), 1)
    values = zip(shares, curve.mean_confidence, curve.accuracy, strict=True)
    return {
        "reliability": reliability_chart(curve),
        "overconfidence": curve.overconfidence,
        "calibration_error": curve.expected_calibration_error,
        "bins": [
            {
                "range": (index / number, (index + 1) / number),
                "share": share,
                "confidence": confidence,
                "accuracy": accuracy,
            }
            for index, (share, confidence, accuracy) in enumerate(values)
        ],
    }
