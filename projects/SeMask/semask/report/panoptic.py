"""The report of a panoptic evaluation: ``report.html``, one self-contained file.

It is made from the file that ``PanopticEvaluator`` writes, and from AP and mIoU if they were
evaluated. Only the few shown images are predicted again.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from semask.evaluation import sem_seg_evaluator
from semask.evaluation.instance_evaluators import RESULT_FILE
from semask.evaluation.panoptic_evaluator import PANOPTIC_FILE
from semask.inference.model_outputs import Mapper, evaluating
from semask.report.charts import spread_values
from semask.report.page import (
    defined,
    modification_date,
    read_evaluation,
    worst_and_best_records,
    write_page,
)
from semask.report.panoptic_pictures import show_segments
from semask.utils.files import read_json

# Results, their names on the page, and explanations.
_TILES = (
    ("PQ", "PQ", "panoptic quality"),
    ("SQ", "SQ", "mean IoU of the correct segments"),
    ("RQ", "RQ", "F1 of the segments"),
    ("PQ_th", "PQ things", "mean over things"),
    ("PQ_st", "PQ stuff", "mean over stuff"),
)
# The same for optional evaluations: file and key of the result.
_BESIDE = (
    (RESULT_FILE, ("segm", "AP"), "Mask AP", "things, mean over IoU 0.50 to 0.95"),
    (RESULT_FILE, ("bbox", "AP"), "Box AP", "things, mean over IoU 0.50 to 0.95"),
    (sem_seg_evaluator.RESULT_FILE, ("mIoU",), "mIoU", "mean IoU of the classes"),
)


def write_panoptic_report(
    model: nn.Module,
    dataset_name: str,
    mapper: Mapper,
    folder: str,
    *,
    num_images: int = 4,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Write the report of an evaluation next to its result file, atomically.

    Args, Returns, Raises: as for :func:`semask.report.semantic.write_report`.
    """
    source = os.path.join(folder, PANOPTIC_FILE)
    document = read_evaluation(source, dataset_name, ("images", "classes"))
    images: list[dict[str, Any]] = document["images"]
    groups = worst_and_best_records(document, "PQ", num_images, dataset_name, source)
    with evaluating(model) as model:
        worst, best = (
            [
                show_segments(model, record, image, mapper, dataset_name=dataset_name)
                for record, image in group
            ]
            for group in groups
        )
    results = {key: defined(value) for key, value in document["results"].items()}
    classes = [
        {
            **row,
            **{key: defined(row[key]) for key in ("PQ", "SQ", "RQ")},
            "AP": _result(folder, RESULT_FILE, dataset_name, ("segm", f"AP-{row['name']}")),
        }
        for row in document["classes"]
    ]
    return write_page(
        *(folder, "panoptic.html.j2"),
        title=dataset_name,
        facts=[
            ("Evaluated", modification_date(source)),
            ("Images", f"{len(images):,}"),
            ("Classes", f"{len(classes)}, {sum(row['isthing'] for row in classes)} of them things"),
            ("Segments", f"{sum(image['segments'] for image in images):,}"),
            *facts,
        ],
        tiles=[
            *((name, results[key], words) for key, name, words in _TILES),
            *(
                (name, value, words)
                for file, place, name, words in _BESIDE
                if (value := _result(folder, file, dataset_name, place)) is not None
            ),
        ],
        results=results,
        groups=[
            (name, key, _best_first(classes, isthing=isthing))
            for name, key, isthing in (("Things", "PQ_th", True), ("Stuff", "PQ_st", False))
        ],
        **spread_values(images, "PQ"),
        worst=worst,
        best=best,
    )


def _best_first(classes: Sequence[Mapping[str, Any]], *, isthing: bool) -> list[Mapping[str, Any]]:
    """Things or stuff, absent ones last; the sort is stable."""
    chosen = [row for row in classes if row["isthing"] == isthing]
    return sorted(chosen, key=lambda row: -np.nan_to_num(row["PQ"], nan=-1))


def _result(folder: str, file: str, dataset_name: str, place: Sequence[str]) -> float | None:
    """A result of an evaluation of the same dataset; None if there is none."""
    path = os.path.join(folder, file)
    document = read_json(path) if os.path.isfile(path) else {}
    if document.get("dataset") != dataset_name:
        return None
    value: Any = document["results"]
    for key in place:
        if key not in value:
            return None
        value = value[key]
    return defined(value)
