"""Results of a study as tables and as a figure: every seed, means, and paired differences."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import grid

RESAMPLES = 10_000
LEVEL = 95
COLOR = "#2b6cb0"
GREY = "#718096"
# Resources of a run in addition to its metrics: title and factor.
USED = {
    "seconds_per_step": ("s per step", 1.0),
    "cpu_seconds": ("CPU minutes", 1 / 60),
    "peak_gib": ("peak, GiB", 1.0),
}


@dataclass(frozen=True)
class Difference:
    """The difference of two runs with the same seeds.

    Attributes:
        values: by seed.
        low, high: bootstrap interval of the mean (``LEVEL`` %, percentiles, seeds resampled);
            NaN with one seed. With three seeds it is the range of the three differences, which is
            on one side of 0 in a quarter of all studies even without an effect.
    """

    values: Mapping[str, float]
    low: float
    high: float

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.values.values())

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0; False with one seed."""
        return self.low > 0 or self.high < 0


def difference(
    run: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]], metric: str
) -> Difference | None:
    """``run`` minus ``other``, each {seed: {metric: value}}; None without a common seed."""
    values = {
        seed: results[metric] - other[seed][metric]
        for seed, results in run.items()
        if seed in other and metric in results and metric in other[seed]
    }
    if not values:
        return None
    if len(values) == 1:
        return Difference(values, float("nan"), float("nan"))
    taken = np.asarray(list(values.values()))
    generator = np.random.default_rng(0)
    means = generator.choice(taken, size=(RESAMPLES, len(taken))).mean(axis=1)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Difference(values, float(low), float(high))


def render(report: Mapping[str, Any]) -> str:
    """The tables in Markdown.

    Args:
        report: see ``benchmarks.study.collect``.
    """
    metrics, runs = report["metrics"], report["runs"]
    used = [key for key in USED if any(key in s for r in runs.values() for s in _seeds(r).values())]
    headers = ["run", "seeds", *metrics.values(), *(USED[key][0] for key in used)]
    rows = []
    for run in runs.values():
        seeds = _seeds(run)
        cells = [_cell(_values(seeds, name), 2) for name in metrics]
        cells += [_cell([v * USED[key][1] for v in _values(seeds, key)], 2) for key in used]
        rows.append([run["label"], ", ".join(seeds) or "–", *cells])
    machine = report["machine"]
    lines = [
        f"**{report['title']}** {machine['processor']}, {machine['cores']} cores, "
        f"{machine['instruction_set']}; Python {machine['python']}, PyTorch {machine['torch']}; "
        f"{report['date']}. Mean (lowest to highest) of the seeds.",
        "",
        f"    {report['command']}",
        "",
        grid(headers, rows),
    ]
    rows = []
    for one, other in report["pairs"]:
        name = f"{runs[one]['label']} − {runs[other]['label']}"
        found = [difference(_seeds(runs[one]), _seeds(runs[other]), metric) for metric in metrics]
        rows.append([name, *map(_interval, found)])
    if rows:
        lines += [
            "",
            f"Mean of the paired differences, seed by seed [{LEVEL} % bootstrap interval]; an "
            "interval that contains 0 shows no difference. With three seeds it is the range of the "
            "three differences, which is on one side of 0 one time in four by chance alone.",
            "",
            grid(["difference", *metrics.values()], rows),
        ]
    return "\n".join(lines)


def draw(report: Mapping[str, Any], path: Path) -> bool:
    """Each seed and the mean of every run; below, the paired differences with their intervals.

    Args:
        report: see ``benchmarks.study.collect``.
        path: of the picture, .svg or .png.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = {name: run for name, run in report["runs"].items() if run["seeds"]}
    pairs = [pair for pair in report["pairs"] if set(pair) <= set(runs)]
    metrics = report["metrics"]
    if not runs:
        return False
    parts = 2 if pairs else 1
    heights = [len(runs) + 1, len(pairs) + 1][:parts]
    with pyplot.rc_context({"svg.hashsalt": "semask", "font.size": 9}):
        figure, axes = pyplot.subplots(
            parts,
            len(metrics),
            figsize=(3 + 3.2 * len(metrics), 0.8 + 0.36 * sum(heights)),
            squeeze=False,
            layout="constrained",
            gridspec_kw={"height_ratios": heights},
        )
        for column, (metric, title) in enumerate(metrics.items()):
            first = column == 0
            _draw_runs(axes[0][column], runs, metric, title, first)
            if pairs:
                _draw_pairs(axes[1][column], runs, pairs, metric, title, first)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
    return True


def _draw_runs(
    axis: Any, runs: Mapping[str, Mapping[str, Any]], metric: str, title: str, labelled: bool
) -> None:
    for place, run in enumerate(runs.values()):
        values = _values(run["seeds"], metric)
        axis.plot(values, [place] * len(values), "o", color=COLOR, alpha=0.6, markersize=4)
        if values:
            axis.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="black")
    _finish(axis, [run["label"] for run in runs.values()], labelled)
    axis.set_title(f"{title}: seeds and mean", loc="left", fontsize=9)


def _draw_pairs(
    axis: Any,
    runs: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Sequence[str]],
    metric: str,
    title: str,
    labelled: bool,
) -> None:
    axis.axvline(0, color=GREY, linewidth=0.8)
    for place, (one, other) in enumerate(pairs):
        found = difference(runs[one]["seeds"], runs[other]["seeds"], metric)
        if found is None:
            continue
        values = list(found.values.values())
        axis.plot([found.low, found.high], [place] * 2, color=COLOR, linewidth=4, alpha=0.35)
        axis.plot(values, [place] * len(values), "o", color=COLOR, alpha=0.6, markersize=4)
        axis.plot([found.mean] * 2, [place - 0.3, place + 0.3], color="black")
    names = [f"{runs[one]['label']} − {runs[other]['label']}" for one, other in pairs]
    _finish(axis, names, labelled)
    axis.set_title(f"{title}: paired difference, {LEVEL} %", loc="left", fontsize=9)


def _finish(axis: Any, names: Sequence[str], labelled: bool) -> None:
    axis.set_yticks(range(len(names)), names if labelled else [""] * len(names))
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.grid(axis="x", linewidth=0.4)
    axis.spines[["top", "right"]].set_visible(False)


def _seeds(run: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    return run["seeds"]


def _values(seeds: Mapping[str, Mapping[str, float]], metric: str) -> list[float]:
    return [results[metric] for results in seeds.values() if metric in results]


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _interval(found: Difference | None) -> str:
    if found is None:
        return "–"
    if len(found.values) == 1:
        return f"{found.mean:+.2f} [one seed]"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
