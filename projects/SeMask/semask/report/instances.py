"""The report of an instance evaluation: ``report.html``, one self-contained file.

It is made from the file that ``InstanceEvaluator`` writes. Only the few shown images are predicted
again.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from semask.evaluation.instance_evaluators import RESULT_FILE
from semask.inference.model_outputs import Mapper, evaluating
from semask.report.charts import spread_values
from semask.report.instance_pictures import show_instances
from semask.report.page import (
    defined,
    modification_date,
    read_evaluation,
    worst_and_best_records,
    write_page,
)

# Keys of the results, and their names on the page.
_TASKS = (("segm", "Mask"), ("bbox", "Box"), ("boundary", "Boundary"))


def write_instance_report(
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
    source = os.path.join(folder, RESULT_FILE)
    document = read_evaluation(source, dataset_name)
    images: list[dict[str, Any]] = document["images"]
    groups = worst_and_best_records(document, "F1", num_images, dataset_name, source)
    with evaluating(model) as model:
        worst, best = (
            [
                show_instances(
                    *(model, record, image, mapper),
                    dataset_name=dataset_name,
                    masks=document["masks"],
                )
                for record, image in group
            ]
            for group in groups
        )
    results = _results(document["results"])
    tasks = [{"name": name, "results": results[key]} for key, name in _TASKS if key in results]
    return write_page(
        *(folder, "instance.html.j2"),
        title=dataset_name,
        facts=[
            ("Evaluated", modification_date(source)),
            ("Images", f"{len(images):,}"),
            ("Categories", str(len(document["categories"]))),
            ("Instances", f"{sum(image['instances'] for image in images):,}"),
            *facts,
        ],
        tiles=_tiles(results),
        tasks=tasks,
        categories=_category_rows(results, document["categories"]),
        **spread_values(images, "F1"),
        worst=worst,
        best=best,
    )


def _results(
    results: Mapping[str, Mapping[str, float | None]],
) -> dict[str, dict[str, float]]:
    return {
        task: {key: defined(value) for key, value in values.items()}
        for task, values in results.items()
    }


def _tiles(results: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, str]]:
    """Name, value in percent and explanation of the most important results."""
    explained = {"AP": "mean over IoU 0.50 to 0.95", "AP50": "at IoU 0.50", "AP75": "at IoU 0.75"}
    return [
        (f"{name} {metric}", results[key][metric], words)
        for key, name in _TASKS
        if key in results
        for metric, words in explained.items()
    ]


def _category_rows(
    results: Mapping[str, Mapping[str, float]], categories: Sequence[str]
) -> list[dict[str, Any]]:
    """Name and AP of each category, highest AP first and absent ones last."""
    values = np.stack(
        [category_ap(results[key], categories) for key, _ in _TASKS if key in results], axis=1
    )
    # The sort is stable: ties keep the dataset's order.
    order = np.argsort(-np.nan_to_num(values[:, 0], nan=-1), kind="stable")
    return [{"name": categories[index], "ap": values[index].tolist()} for index in order]


def category_ap(results: Mapping[str, float], categories: Sequence[str]) -> np.ndarray:
    """AP of each category in percent; NaN if it has none."""
    if len(categories) == 1:  # Detectron2 returns only the mean
        return np.array([results["AP"]])
    return np.array([results.get(f"AP-{name}", np.nan) for name in categories])
