#!/usr/bin/env python3
"""Measure time and memory of the project against the plain form of the same computation.

    python benchmarks/run.py
    python benchmarks/run.py --quick
    python benchmarks/run.py --rows inference training --models semask-t --repeats 15
    python benchmarks/run.py --device cuda --dtype bfloat16 --output output/benchmark
    python benchmarks/run.py --rows training MODEL.FAST_PATHS none

Prints one table and, with --output, writes benchmark.json. All figures are ratios within this run:
both sides alternate, and times are in units of a matrix product measured between the turns.
Overrides of the config, for both sides, come last. Exit status: 0; 1 if a case failed; 2 for a
mistake in the arguments.
"""

import argparse
import dataclasses
import datetime
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cases, figure, table
from benchmarks.cases import Case, Extent
from benchmarks.data import measure_data
from benchmarks.measure import UNIT_OPERATIONS, Effort, measure, measure_startup, spread
from benchmarks.process import Worker, WorkerError

# A key of a config, such as MODEL.DEVICE.
OVERRIDE = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")
DTYPES = ("float32", "tf32", "bfloat16", "float16")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="run.py [options] [KEY VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Extent()
    parser.add_argument("--rows", nargs="+", choices=cases.ROWS, default=list(cases.ROWS))
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"of {', '.join(cases.MODELS)}, or configs; default: all of these. In the row "
        f"'encoders': of {', '.join(cases.ENCODER_MODELS)}",
    )
    parser.add_argument("--repeats", type=int, default=7, help="maximum turns of a case (7)")
    parser.add_argument("--seconds", type=float, default=40, help="time limit of a case (40)")
    parser.add_argument("--threads", type=int, default=_cores(), help="default: all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number format")
    parser.add_argument("--size", type=int, help=f"side of the images ({default.size})")
    parser.add_argument("--sizes", type=int, nargs="+", help="for the row 'size'")
    parser.add_argument("--classes", type=int, nargs="+", help="for the row 'classes'")
    parser.add_argument("--inference-batches", type=int, nargs="+", help="for the row 'inference'")
    parser.add_argument("--training-batch", type=int, help="2 on the CPU, 16 on a GPU")
    parser.add_argument("--training-batches", type=int, nargs="+", help="for the row 'batch'")
    parser.add_argument("--wide", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=Path, help="folder of JPEGs for the row 'data'")
    parser.add_argument("--quick", action="store_true", help="one minute: only check that it runs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write benchmark.json there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw a .svg or .png")
    words = list(sys.argv[1:] if argv is None else argv)
    # Split off here, as "--rows a b KEY VALUE" would parse them as rows.
    first = next((i for i, word in enumerate(words) if OVERRIDE.fullmatch(word)), len(words))
    args = parser.parse_args(words[:first])
    args.opts = words[first:]
    if min(args.repeats, args.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    if len(args.opts) % 2:
        parser.error(f"overrides must be pairs KEY VALUE, got {' '.join(args.opts)}")
    return args


def extent_of(args: argparse.Namespace) -> Extent:
    """The extent of the rows, from the arguments."""
    extent = Extent()
    if args.device == "cuda":
        extent = cases.on_gpu(extent)
    if args.quick:
        extent = cases.quick(extent)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(Extent):
        value = getattr(args, field.name)
        if value is not None:
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(extent, **given)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the rows that the arguments select.

    Returns:
        "date", "machine", "settings", "unit" ({"seconds": spread, "gflops"}) and "rows": by name,
        for the rows of models a list of ``measure``'s results, for "data" that of ``measure_data``
        and for "startup" that of ``measure_startup``.
    """
    extent = extent_of(args)
    base = Case(
        model=extent.models[0],
        kind="inference",
        batch=1,
        height=extent.size,
        width=extent.size,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        opts=tuple(args.opts),
    )
    repeats = min(args.repeats, 2) if args.quick else args.repeats
    effort = Effort(repeats=repeats, seconds=5 if args.quick else args.seconds)
    images = [] if args.images is None else sorted(args.images.glob("*.jp*g"))
    rows: dict[str, Any] = {}
    load = os.getloadavg()[0]
    with Worker(args.threads, {"job": "unit", "case": base.as_dict()}) as unit:
        machine = unit.ask({"machine": args.device})
        unit_seconds = [unit.turn()["seconds"] for _ in range(5)]
        measured: dict[Case, dict[str, Any]] = {}
        for row in args.rows:
            if row == "data":
                _say("data")
                rows[row] = measure_data(base, effort, images)
            elif row == "startup":
                _say("startup")
                rows[row] = measure_startup(base, min(repeats, 3))
            else:
                row_cases = cases.MODEL_ROWS[row](base, extent)
                for case in row_cases:
                    if case not in measured:
                        _say(f"{row}: {case.model}, {case.batch} x {case.height} x {case.width}")
                        measured[case] = measure(case, unit, effort)
                rows[row] = [measured[case] for case in row_cases]
    for result in measured.values():
        for side in result["sides"]:
            taken = result.get(side, {}).get("unit_seconds")
            unit_seconds += taken["all"] if taken else []
    seconds = spread(unit_seconds)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "settings": {
            "threads": args.threads,
            "dtype": args.dtype,
            "device": args.device,
            "repeats": repeats,
            "load_before": load,
            "opts": list(args.opts),
        },
        "unit": {"seconds": seconds, "gflops": UNIT_OPERATIONS / seconds["median"] / 1e9},
        "rows": rows,
    }


def failures(report: dict[str, Any]) -> list[str]:
    """The failures of each case."""
    found: dict[str, None] = {}  # a case may be in several rows
    for row, results in report["rows"].items():
        for result in results if row in cases.MODEL_ROWS else ():
            for part in (result, *(result.get(side, {}) for side in result["sides"])):
                if "error" in part:
                    found[f"{result['model']}, {result['kind']}: {part['error']}"] = None
    return list(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    args = parse(argv)
    try:
        report = run(args)
    except (WorkerError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(table.render(report))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / "benchmark.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = failures(report)
    if args.figure and not figure.draw(report, args.figure):
        failed.append("the figure, which shows the rows 'inference' and 'training'")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _say(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
