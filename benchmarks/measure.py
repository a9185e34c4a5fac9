"""The measuring loop: unit, fast, plain, repeated; medians and spreads."""

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import SIDES, Case
from benchmarks.peers import missing
from benchmarks.process import Worker, WorkerError

# As in benchmarks.sides, which imports PyTorch; this process does not.
UNIT_OPERATIONS = 2 * 2048**3


@dataclass(frozen=True)
class Effort:
    """The number of measurements of a case.

    Attributes:
        repeats: maximum number of turns of each side.
        seconds: no turn starts after this time,
        least: except for this minimum number of turns.
    """

    repeats: int = 7
    seconds: float = 60.0
    least: int = 2


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest of some values, and the values."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "all": list(values),
    }


def measure(case: Case, unit: Worker, effort: Effort) -> dict[str, Any]:
    """Measure all sides of a case.

    Args:
        case: the computation.
        unit: the worker that computes the matrix product.
        effort: the number of measurements.

    Returns:
        The case's fields; "gflop" and "arithmetic_units", the cost of its matrix products; for each
        side {"seconds", "units", "images_per_second", "share_of_peak", "peak_bytes"}, {"error"}, or
        {"missing"} for a peer that is not installed; and if both "fast" and "plain" have run,
        "speedup" and "memory_ratio".
    """
    result: dict[str, Any] = {**case.as_dict(), "interleaved": not case.apart}
    try:
        count = unit.ask({"count": case.as_dict()})["operations"]
    except WorkerError as error:
        return {**result, "error": str(error)}
    result["gflop"] = count / 1e9
    result["arithmetic_units"] = count / UNIT_OPERATIONS
    for side in case.sides:
        if reason := missing(side):
            result[side] = {"missing": reason}
    sides = tuple(side for side in case.sides if side not in result)
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    groups = [(side,) for side in sides] if case.apart else [sides]
    for group in groups:
        errors = _take_turns(case, group, unit, effort, turns)
        for side, reason in errors.items():
            result[side] = {"error": reason}
    for side in sides:
        if side not in result:
            result[side] = _summary(case, turns[side], result["arithmetic_units"])
    if all("units" in result.get(side, {}) for side in SIDES):
        ratios = [
            plain["units"] / fast["units"]
            for fast, plain in zip(turns["fast"], turns["plain"], strict=False)
        ]
        result["speedup"] = spread(ratios)
        result["memory_ratio"] = result["fast"]["peak_bytes"] / result["plain"]["peak_bytes"]
    return result


def _take_turns(
    case: Case,
    sides: Sequence[str],
    unit: Worker,
    effort: Effort,
    turns: dict[str, list[dict[str, Any]]],
) -> dict[str, str]:
    """Add alternating turns of some sides; returns the failures."""
    errors: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for side in sides:
            job = {"job": "model", "case": case.as_dict(), "side": side}
            try:
                workers[side] = stack.enter_context(Worker(case.threads, job))
            except WorkerError as error:
                errors[side] = str(error)
        start = time.monotonic()
        for repeat in range(effort.repeats):
            if repeat >= effort.least and time.monotonic() - start > effort.seconds:
                break
            for side, worker in list(workers.items()):
                try:
                    before = unit.turn()["seconds"]
                    turn = worker.turn()
                    after = unit.turn()["seconds"]
                except WorkerError as error:
                    errors[side] = str(error)
                    workers.pop(side).close()
                    continue
                turn["unit_seconds"] = (before + after) / 2
                turn["units"] = turn["seconds"] / turn["unit_seconds"]
                turns[side].append(turn)
    return errors


def _summary(case: Case, turns: Sequence[dict[str, Any]], arithmetic: float) -> dict[str, Any]:
    seconds = spread([turn["seconds"] for turn in turns])
    units = spread([turn["units"] for turn in turns])
    return {
        "seconds": seconds,
        "units": units,
        "unit_seconds": spread([turn["unit_seconds"] for turn in turns]),
        "images_per_second": case.batch / seconds["median"],
        "share_of_peak": arithmetic / units["median"],
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
    }


def measure_startup(case: Case, repeats: int) -> dict[str, Any]:
    """Measure imports and building, each time in a new process.

    Returns:
        For each side the spreads of "torch_import_seconds" (PyTorch alone), "import_seconds" (the
        project, Detectron2 and the config) and "build_seconds" (the model with random weights).
    """
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            job = {"job": "startup", "case": case.as_dict(), "side": side}
            with Worker(case.threads, job) as worker:
                turns[side].append(worker.turn())
    sides = {
        side: {name: spread([turn[name] for turn in taken]) for name in taken[0]}
        for side, taken in turns.items()
    }
    return {"model": case.model, **sides}
