#!/usr/bin/env python3
"""Do semantic priors help a Mask R-CNN on cell nuclei? Trains each model with each seed.

    DETECTRON2_DATASETS=data python benchmarks/nuclei.py --seeds 1 2 3 --output output/nuclei

The models have the same size, budget and data: SeMask with and without a loss on its prior, and
the Swin baseline (configs/nuclei). They are trained one after the other, each in a process of its
own; what is finished in the output folder already is not trained again, so that the command can be
stopped and repeated, with more seeds as well. Prints AP, AP50 and AP75 of boxes and masks, mean
and range over the seeds, with time and memory, and writes nuclei.md and nuclei.json. At the end
come overrides of the config, for all models. Exit status: 0; 1 if a training failed; 2 for a
mistake in the arguments.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "semask": ("SeMask, prior supervised", "semask_mask_rcnn"),
    "unsupervised": ("SeMask, prior not supervised", "semask_unsupervised_mask_rcnn"),
    "swin": ("Swin", "swin_mask_rcnn"),
}
METRICS = tuple(f"{task}/{name}" for task in ("segm", "bbox") for name in ("AP", "AP50", "AP75"))
USAGE_FILE = "usage.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", default="output/nuclei_comparison", metavar="DIR")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY VALUE")
    return parser.parse_args(argv)


def train(model: str, seed: int, folder: Path, overrides: Sequence[str]) -> bool:
    """Train and evaluate, going on where an earlier command has stopped; whether it worked."""
    if results_of(folder) is not None:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    config = ROOT / "configs" / "nuclei" / f"{MODELS[model][1]}.yaml"
    command = [
        *(sys.executable, str(ROOT / "train_net.py"), "--resume", "--config-file", str(config)),
        *("SEED", str(seed), "OUTPUT_DIR", str(folder), *overrides),
    ]
    started = time.monotonic()
    with (folder / "train.out").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    earlier = _read(folder / USAGE_FILE)
    used = {
        "seconds": time.monotonic() - started + earlier.get("seconds", 0),
        "cpu_seconds": usage.ru_utime + usage.ru_stime + earlier.get("cpu_seconds", 0),
        "peak_gib": max(usage.ru_maxrss / 2**20, earlier.get("peak_gib", 0)),
    }
    (folder / USAGE_FILE).write_text(json.dumps(used))
    return process.returncode == 0


def results_of(folder: Path) -> dict[str, float] | None:
    """The final results of a run, with what it used; None where it is not finished."""
    if not (folder / "model_final.pth").is_file() or not (folder / "metrics.json").is_file():
        return None
    found: dict[str, float] = {}
    seconds = []
    for line in (folder / "metrics.json").read_text().splitlines():
        entry = json.loads(line)
        found |= {name: entry[name] for name in METRICS if name in entry}
        seconds += [entry["time"]] if "time" in entry else []
    if not found:
        return None
    found["seconds per step"] = statistics.median(seconds) if seconds else float("nan")
    return found | _read(folder / USAGE_FILE)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def table(runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """The comparison in Markdown.

    Args:
        runs: results of each seed of each model.
    """
    columns = (*METRICS, "seconds per step", "cpu_seconds", "peak_gib")
    titles = [
        *(f"{'mask' if name.startswith('segm') else 'box'} {name[5:]}" for name in METRICS),
        *("s per step", "CPU minutes", "peak, GiB"),
    ]
    lines = [
        f"| model | seeds | {' | '.join(titles)} |",
        f"| --- | ---: |{' ---: |' * len(titles)}",
    ]
    for model, by_seed in runs.items():
        cells = []
        for name in columns:
            values = [run[name] for run in by_seed.values() if name in run]
            cells.append(_cell([value / 60 for value in values] if "cpu" in name else values))
        seeds = ", ".join(map(str, by_seed))
        lines.append(f"| {MODELS[model][0]} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def run(argv: Sequence[str] | None = None) -> int:
    """The whole program; see the top of this file for the exit status it returns."""
    args = parse(argv)
    output = Path(args.output).resolve()
    runs: dict[str, dict[int, dict[str, float]]] = {model: {} for model in args.models}
    failed = []
    for seed in args.seeds:  # all models of a seed first: what is finished can be compared
        for model in args.models:
            folder = output / f"{model}_seed{seed}"
            print(f"{MODELS[model][0]}, seed {seed}: {folder}", flush=True)
            if not train(model, seed, folder, args.overrides):
                failed.append(folder)
                print(f"  failed; see {folder / 'train.out'}", file=sys.stderr, flush=True)
            elif (results := results_of(folder)) is not None:
                runs[model][seed] = results
    text = table(runs)
    output.mkdir(parents=True, exist_ok=True)
    (output / "nuclei.md").write_text(text + "\n")
    (output / "nuclei.json").write_text(json.dumps(runs, indent=1))
    print(text)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(run())
