"""Evaluation reports from templates (autoescaped; a missing value is an error).

Each is one page of HTML that needs nothing from outside itself.
"""

import math
import os
import time
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from semask.utils.text import pluralize


def render(template: str, **values: Any) -> str:
    """Fill in a template.

    Args:
        template: its file below ``templates``.
        values: what it names.
    """
    return _environment.get_template(template).render(values)


def modification_date(path: str) -> str:
    """When a file was written, in local time, such as "2026-11-28 00:16"."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(os.path.getmtime(path)))


def percent(share: float, digits: int = 1) -> str:
    """0.4212 as "42.1 %"; an en dash for NaN."""
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """42.124 as "42.12"; an en dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def shortened(name: str, length: int = 26) -> str:
    """A name that is cut off where it is too long."""
    return name if len(name) <= length else name[: length - 1] + "…"


_environment = Environment(
    loader=PackageLoader("semask.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {
    "percent": percent,
    "number": number,
    "pluralize": pluralize,
    "shortened": shortened,
}
_environment.tests |= {"nan": math.isnan}
