"""A figure of time and memory, fast against plain."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLORS = {"fast": "#2b6cb0", "plain": "#b8bec8"}
ARITHMETIC = "#1a202c"


def draw(report: Mapping[str, Any], path: Path) -> bool:
    """Draw bars for the inference and training rows; the suffix determines the format.

    Args:
        report: see ``benchmarks.run.run``.
        path: of the picture.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [
        (title, [r for r in report["rows"].get(row, []) if "speedup" in r])
        for row, title in (("inference", "Inference"), ("training", "Training step"))
    ]
    groups = [(title, results) for title, results in groups if results]
    if not groups:
        return False
    with pyplot.rc_context({"svg.hashsalt": "semask", "font.size": 9}):
        figure, axes = pyplot.subplots(
            len(groups), 2, figsize=(9, 1 + 1.9 * len(groups)), squeeze=False, layout="constrained"
        )
        for (title, results), (time, memory) in zip(groups, axes, strict=True):
            names = [f"{r['model']}, batch {r['batch']}" for r in results]
            _bars(time, names, results, lambda result: result["units"]["median"])
            for place, result in enumerate(results):
                time.plot(
                    [result["arithmetic_units"]] * 2, [place - 0.4, place + 0.4], color=ARITHMETIC
                )
            time.set_title(f"{title}: time, units (line: the arithmetic alone)", loc="left")
            _bars(memory, names, results, lambda result: result["peak_bytes"] / 2**30)
            memory.set_title(f"{title}: peak memory, GiB", loc="left")
        axes[0][0].legend(loc="upper right", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
    return True


def _bars(axis: Any, names: list[str], results: list[Mapping[str, Any]], value: Any) -> None:
    places = range(len(names))
    for side, offset in (("fast", -0.2), ("plain", 0.2)):
        bars = axis.barh(
            [place + offset for place in places],
            [value(result[side]) for result in results],
            height=0.38,
            color=COLORS[side],
            label=side,
        )
        axis.bar_label(bars, fmt="%.3g", padding=2)
    axis.set_yticks(list(places), names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
