"""Plots of training runs, from their metrics.json."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from semask.errors import UserError
from semask.utils.files import parse_json, replacing

FILE_NAME = "metrics.json"
# Okabe and Ito's colours, distinguishable without full colour vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
LINES = ("-", "--", ":", "-.")
FORMATS = ("png", "svg", "pdf")


class MetricsError(UserError):
    """A metrics.json that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """The scalars of a training run.

    Attributes:
        name: for the legend.
        points: (iteration, {scalar: value}), by iteration.
    """

    name: str
    points: Sequence[tuple[int, Mapping[str, float]]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a scalar, at the iterations at which it was written."""
        found = [(step, values[key]) for step, values in self.points if key in values]
        return [step for step, _ in found], [value for _, value in found]

    def names(self) -> set[str]:
        """All scalars."""
        return {key for _, values in self.points for key in values}


def read_run(path: str, name: str = "") -> Run:
    """Read a file of Detectron2's ``JSONWriter``, also of several resumed runs.

    Args:
        path: a folder with a metrics.json, or such a file.
        name: for the legend; "" = the folder's name.

    Raises:
        MetricsError: the file is missing or empty, or has a line that is neither a JSON object with
            an "iteration" nor the incomplete last line of a killed run.
    """
    file_name = os.path.join(path, FILE_NAME) if os.path.isdir(path) else path
    try:
        with open(file_name, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except FileNotFoundError as error:
        raise MetricsError(
            f"There is no '{file_name}'. A run writes it to its OUTPUT_DIR after its first "
            "iterations."
        ) from error
    except OSError as error:
        raise MetricsError(f"Cannot read '{file_name}': {error.strerror}.") from error
    points: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _parsed(line, file_name, number, is_last=number == len(lines))
        if entry is None:
            continue
        step = int(entry.pop("iteration"))
        if points and step < max(points):  # resumed from an earlier checkpoint
            points = {known: values for known, values in points.items() if known < step}
        points.setdefault(step, {}).update(entry)
    if not points:
        raise MetricsError(f"'{file_name}' has no entries yet; wait for the first iterations.")
    folder = os.path.dirname(os.path.abspath(file_name))
    return Run(name or os.path.basename(folder) or folder, sorted(points.items()))


def plot_runs(runs: Sequence[Run]) -> Figure:
    """Plot losses, learning rate and mIoU over the iterations, all runs in the same axes.

    Args:
        runs: at least one; each gets its own colour.
    """
    figure = Figure(figsize=(9, 10), layout="constrained")
    losses, rate, accuracy = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1.2, 2]}
    )
    keys = sorted({key for run in runs for key in run.names()})
    loss_keys = [key for key in keys if "loss" in key.rsplit("/", 1)[-1]]
    # The total loss first, as a solid line.
    loss_keys.sort(key=lambda key: (key != "total_loss", key))
    _draw(losses, runs, loss_keys, "loss")
    _draw(rate, runs, [key for key in keys if key == "lr"], "learning rate")
    _draw(accuracy, runs, [key for key in keys if key.endswith("mIoU")], "mIoU, percent", "o")
    if loss_keys:
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        losses.yaxis.set_minor_formatter(NullFormatter())
    accuracy.set_xlabel("iteration")
    return figure


def save_figure(figure: Figure, path: str) -> None:
    """Write a picture atomically; the suffix determines the format.

    Raises:
        MetricsError: the format is not supported.
    """
    kind = os.path.splitext(path)[1].removeprefix(".").lower()
    if kind not in FORMATS:
        raise MetricsError(f"'{path}' must end in .{', .'.join(FORMATS)}.")
    FigureCanvasAgg(figure)
    with replacing(path) as file:
        figure.savefig(file, format=kind, dpi=140)


def _parsed(line: str, file_name: str, number: int, *, is_last: bool) -> dict[str, Any] | None:
    """Parse one line; None for an incomplete line of a killed run."""
    entry = _json(line)
    if entry is None and "{" in line[1:]:
        # A resumed run appends to the incomplete line.
        entry = _json(line[line.rindex("{") :])
        if entry is not None:
            _warn(f"line {number} of '{file_name}' begins with a fragment, which is ignored")
    if entry is None and is_last:
        _warn(f"the last line of '{file_name}' is incomplete and ignored")
        return None
    if entry is None:
        raise MetricsError(
            f"Line {number} of '{file_name}' is not an entry: {line[:60]!r}. The file is "
            "damaged, or not written by a training run; remove the line to plot the others."
        )
    return entry


def _json(text: str) -> dict[str, Any] | None:
    """Parse an object with an iteration and numbers, or return None."""
    try:
        entry = parse_json(text)
    except ValueError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
        return None
    return {key: value for key, value in entry.items() if isinstance(value, (int, float))}


def _draw(
    axes: Axes, runs: Sequence[Run], keys: Sequence[str], label: str, marker: str = ""
) -> None:
    for index, run in enumerate(runs):
        for position, key in enumerate(keys):
            steps, values = run.series(key)
            if not any(math.isfinite(value) for value in values):
                continue
            axes.plot(
                steps,
                values,
                color=COLORS[index % len(COLORS)],
                linestyle=LINES[position % len(LINES)],
                linewidth=1.4 if position == 0 else 1.0,
                marker=marker or ("o" if len(steps) == 1 else ""),  # a single point has no line
                markersize=4,
                label=_label(run, key, several_runs=len(runs) > 1, several_keys=len(keys) > 1),
            )
    axes.set_ylabel(label)
    axes.grid(color="#d9dee5", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    else:
        axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center", color="#5b6675")


def _label(run: Run, key: str, *, several_runs: bool, several_keys: bool) -> str:
    if not several_runs:
        return key
    return f"{run.name}: {key}" if several_keys else run.name


def _warn(text: str) -> None:
    print(f"Warning: {text}.", file=sys.stderr)
