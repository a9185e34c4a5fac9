"""The benchmark results as text."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADERS = (
    "model",
    "images",
    "K",
    "arithmetic",
    "fast",
    "spread",
    "plain",
    "spread",
    "speed-up",
    "of peak",
    "fast, GiB",
    "plain, GiB",
    "memory",
)
TITLES = {
    "inference": "Inference",
    "training": "Training step, AdamW",
    "memory": "Peak memory",
    "size": "Against the size of the image (inference)",
    "classes": "Against the number of classes",
    "batch": "Against the batch (training step)",
    "masks": "Mask classification",
    "decoders": "Decoders of mask classification",
    "encoders": "Other encoders",
}
PEER_HEADERS = ("model", "beside", "fast", "spread", "peer", "spread", "peer / fast", "peer, GiB")


def render(report: Mapping[str, Any]) -> str:
    """Render all results.

    Args:
        report: see ``benchmarks.run.run``.
    """
    machine, unit = report["machine"], report["unit"]
    where = machine.get("gpu") or (
        f"{machine['processor']}, {machine['cores']} cores, {machine['instruction_set']}"
    )
    settings = report["settings"]
    lines = [
        f"{where}; {machine['system']}, Python {machine['python']}, PyTorch {machine['torch']}; "
        f"{settings['threads']} threads, {settings['dtype']}, eager; {report['date']}",
        f"unit: one 2048 x 2048 x 2048 matrix product, {1000 * unit['seconds']['median']:.3g} ms "
        f"({unit['gflops']:,.0f} GFLOP/s). Times are in units, medians with lowest and highest; "
        "arithmetic: what the operations of",
        "matrix products and convolutions alone would take at that rate; of peak: the share of it "
        "that the fast side reaches; memory: fast / plain.",
    ]
    if settings["load_before"] > 0.5:
        lines.append(
            f"Other programs were running (load {settings['load_before']:.1f} before the start): "
            "multi-threaded operations then take many times as long."
        )
    for row, title in TITLES.items():
        results = report["rows"].get(row)
        if results:
            lines += ["", title, grid(HEADERS, [_cells(result) for result in results])]
            lines += _peers(results)
    if "data" in report["rows"]:
        lines += ["", *_data(report["rows"]["data"], report["rows"].get("training", []))]
    if "startup" in report["rows"]:
        lines += ["", "Start-up, seconds", _startup(report["rows"]["startup"])]
    return "\n".join(lines)


def grid(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(headers), line(rule), *(line(row) for row in rows)])


def _cells(result: Mapping[str, Any]) -> list[str]:
    kind = "" if result["kind"] == "inference" else f" ({result['kind']})"
    start = [
        result["model"] + kind,
        f"{result['batch']} x {result['height']} x {result['width']}",
        str(result["classes"] or "config"),
    ]
    if "error" in result:
        return [*start, *(["failed"] + ["-"] * (len(HEADERS) - 4))]
    cells = [*start, _number(result["arithmetic_units"])]
    fast, plain = (result.get(side, {}) for side in ("fast", "plain"))
    for side in (fast, plain):
        failed = "failed" if "error" in side else "-"
        units = side.get("units")
        cells += [_number(units["median"]), _range(units)] if units else [failed, "-"]
    cells.append(f"{result['speedup']['median']:.2f}" if "speedup" in result else "-")
    cells.append(f"{fast['share_of_peak']:.0%}" if "units" in fast else "-")
    cells += [
        f"{side['peak_bytes'] / 2**30:.2f}" if "units" in side else "-" for side in (fast, plain)
    ]
    cells.append(f"{result['memory_ratio']:.0%}" if "memory_ratio" in result else "-")
    return cells


def _peers(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the peers measured in the same turns, if there are any."""
    rows: list[list[str]] = []
    notes: dict[str, None] = {}
    for result in results:
        for peer in result["sides"]:
            found = result.get(peer, {})
            if peer in ("fast", "plain"):
                continue
            if "missing" in found:
                notes[found["missing"]] = None
            elif "units" in found and "units" in result["fast"]:
                rows.append(_peer_cells(result, peer))
    table = ["", grid(PEER_HEADERS, rows)] if rows else []
    return table + [f"{note}." for note in notes]


def _peer_cells(result: Mapping[str, Any], peer: str) -> list[str]:
    cells = [f"{result['model']} ({result['kind']})", peer]
    for side in ("fast", peer):
        units = result[side]["units"]
        cells += [_number(units["median"]), _range(units)]
    ratio = result[peer]["units"]["median"] / result["fast"]["units"]["median"]
    return [*cells, f"{ratio:.2f}", f"{result[peer]['peak_bytes'] / 2**30:.2f}"]


def _data(data: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> list[str]:
    headers = ("data pipeline", "fast", "spread", "plain", "spread", "speed-up")
    cells = [f"images per second and core, {data['model']}"]
    for side in ("fast", "plain"):
        rate = data[side]["images_per_second"]
        cells += [_number(rate["median"]), _range(rate)]
    cells.append(f"{data['speedup']['median']:.2f}")
    lines = [grid(headers, [cells])]
    for result in training:
        if "error" not in result.get("fast", {"error": ""}):
            consumed = result["fast"]["images_per_second"]
            cores = consumed / data["fast"]["images_per_second"]["median"]
            lines.append(
                f"Training {result['model']} consumes {consumed:.3g} images per second: "
                f"{cores:.3g} cores of the pipeline."
            )
    return lines


def _startup(startup: Mapping[str, Any]) -> str:
    headers = ("model", "PyTorch", "project and config", "build", "spread")
    rows = []
    for side in ("fast", "plain"):
        taken = startup[side]
        rows.append(
            [
                f"{startup['model']}, {side}",
                _number(taken["torch_import_seconds"]["median"]),
                _number(taken["import_seconds"]["median"]),
                _number(taken["build_seconds"]["median"]),
                _range(taken["build_seconds"]),
            ]
        )
    return grid(headers, rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _range(values: Mapping[str, Any]) -> str:
    return f"{_number(values['low'])} to {_number(values['high'])}"
