"""Rendering of evaluation reports from templates (autoescaped; a missing value is an error).

Each is one self-contained HTML page.
"""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog
from jinja2 import Environment, PackageLoader, StrictUndefined

from semask.errors import DataError
from semask.utils.files import read_json, write_text
from semask.utils.text import pluralize

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"


def read_evaluation(
    source: str, dataset_name: str, needed: Sequence[str] = (), hint: str = "Evaluate again."
) -> dict[str, Any]:
    """Read the result file of an evaluation.

    Args:
        source: the file.
        dataset_name: the dataset that it must be of.
        needed: the entries that it must have.
        hint: advice for the error message.

    Raises:
        DataError: it is missing, damaged, incomplete or of another dataset.
    """
    try:
        document: dict[str, Any] = read_json(source)
    except FileNotFoundError as error:
        raise DataError(f"There is no evaluation '{source}' to report on. {hint}") from error
    except ValueError as error:
        raise DataError(f"'{source}' is damaged ({error}). {hint}") from error
    missing = [key for key in needed if key not in document]
    if missing:
        raise DataError(f"'{source}' lacks {' and '.join(missing)}. {hint}")
    if document["dataset"] != dataset_name:
        raise DataError(
            f"'{source}' is an evaluation of '{document['dataset']}', not of '{dataset_name}'."
        )
    return document


def worst_and_best(
    images: Sequence[dict[str, Any]], number: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The worst images, worst first, and the best images, best first, without duplicates.

    Args:
        images: sorted, worst first.
        number: maximum number of each.
    """
    worst = list(images[: min(number, -(-len(images) // 2))])
    best = list(images[len(worst) :][-number:]) if number else []
    return worst, best[::-1]


def worst_and_best_records(
    document: Mapping[str, Any], metric: str, number: int, dataset_name: str, source: str
) -> list[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """The worst and the best images of an evaluation, each with its dataset dict.

    Args:
        document: the result file; its "images" have "image_id", "missed" and "file_name".
        metric: their score in percent; ties are ordered by the number of missed objects. Images
            without a score are left out.
        number: of each, at most.
        dataset_name: the registered dataset.
        source: the path of the result file.

    Returns:
        (dataset dict, entry of the result file) of the worst, and of the best.

    Raises:
        DataError: the dataset does not have an image of the result file.
    """
    scored = sorted(
        (image for image in document["images"] if image[metric] is not None),
        key=lambda image: (image[metric], -image["missed"], image["file_name"]),
    )
    records = {record["image_id"]: record for record in DatasetCatalog.get(dataset_name)}
    groups = worst_and_best(scored, number)
    for image in (*groups[0], *groups[1]):
        if image["image_id"] not in records:
            raise DataError(
                f"'{source}' names image {image['image_id']!r}, which is not in the dataset."
            )
    return [[(records[image["image_id"]], image) for image in group] for group in groups]


def write_page(folder: str, template: str, /, **values: Any) -> str:
    """Render a template into ``REPORT_FILE``, atomically; returns its path.

    Args:
        folder: the output folder.
        template: file name in ``templates``.
        values: the template's variables.
    """
    path = os.path.join(folder, REPORT_FILE)
    write_text(path, render(template, **values))
    logger.info("Report: %s", path)
    return path


def defined(value: float | None) -> float:
    """Convert JSON's null back to NaN."""
    return float("nan") if value is None else value


def render(template: str, **values: Any) -> str:
    """Render a template.

    Args:
        template: file name in ``templates``.
        values: the template's variables.
    """
    return _environment.get_template(template).render(values)


def modification_date(path: str) -> str:
    """The modification time of a file, in local time, such as "2026-11-28 00:16"."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(os.path.getmtime(path)))


def percent(share: float, digits: int = 1) -> str:
    """0.4212 as "42.1 %"; an en dash for NaN."""
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """42.124 as "42.12"; an en dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def truncated(name: str, length: int = 26) -> str:
    """A name, truncated with an ellipsis if it is too long."""
    return name if len(name) <= length else name[: length - 1] + "…"


def template_environment(package: str) -> Environment:
    """The jinja2 environment for a package's templates; autoescaped, a missing value is an error.

    Args:
        package: the package's name; the templates are in its folder ``templates``.
    """
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "pluralize": pluralize,
        "truncated": truncated,
    }
    environment.tests |= {"nan": math.isnan}
    return environment


_environment = template_environment("semask.report")
