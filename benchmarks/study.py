#!/usr/bin/env python3
"""Train models with several seeds in parallel and compare them in tables and a figure.

    DETECTRON2_DATASETS=data python benchmarks/study.py nuclei_mask_rcnn
    python benchmarks/study.py scenes_mask2former --workers 4 --threads 2 --seeds 1 2 3 4 5
    python benchmarks/study.py scenes_mask2former --runs live swin --collect
    python benchmarks/study.py benchmarks/results/scenes_mask2former.json

A study is a file in benchmarks/studies (NAME or a path): see ``read_study`` for its content. Each
run is a separate process. Finished runs in the output folder are not repeated and stopped runs are
resumed, so the command can be interrupted and repeated, also with more seeds. Prints the tables and
writes NAME.md, NAME.json (every metric of every seed, commands, date, commit, machine) and NAME.svg
to the output folder. With such a JSON file as argument, it only redraws tables and figure.
Overrides of all configs come last. Exit status: 0; 1 if a training failed; 2 for a mistake in the
arguments or the study; 130 after Ctrl-C and 143 after SIGTERM, with checkpoints to resume from.
"""

import argparse
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.comparison import draw, render
from benchmarks.run import OVERRIDE
from benchmarks.worker import machine

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "benchmarks" / "studies"
USAGE_FILE = "usage.json"
COMMAND_FILE = "study_run.json"


class StudyError(Exception):
    """A mistake in a study or in the arguments; the message says which."""


@dataclass(frozen=True)
class Run:
    """One model of a study.

    Attributes:
        config: name or path of a config.
        label: its name in the tables; by default the run's name.
        overrides: of the config, KEY VALUE pairs; in the file, a mapping.
        seeds: replace the study's seeds.
    """

    config: str
    label: str = ""
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Study:
    """The runs to compare.

    Attributes:
        title: of tables and figure.
        runs: by name.
        metrics: results in tables and figure, by title; the JSON file has all results.
        seeds: of each run.
        pairs: (run, run it is compared with), seed by seed.
        overrides: of all configs, before those of a run.
    """

    title: str
    runs: Mapping[str, Run]
    metrics: Mapping[str, str]
    seeds: tuple[int, ...] = (1, 2, 3)
    pairs: tuple[tuple[str, str], ...] = ()
    overrides: tuple[str, ...] = field(default=())

    def jobs(self, names: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """(run, seed), all runs of a seed first, so that finished runs can be compared.

        Args:
            names: the selected runs.
            seeds: replace those of the study and its runs; empty = keep those.
        """
        of_run = {name: seeds or self.runs[name].seeds or self.seeds for name in names}
        order = dict.fromkeys(seed for chosen in of_run.values() for seed in chosen)
        return [(name, seed) for seed in order for name in names if seed in of_run[name]]


def read_study(name: str) -> Study:
    """Read a study: a YAML (or JSON) mapping with the fields of ``Study`` and ``Run``.

    Raises:
        StudyError: there is no such file, or it is not a study.
    """
    path = Path(name) if Path(name).suffix else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise StudyError(f"There is no study '{path}'. The repository has: {known}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_fields(content, Study, str(path))
    runs = {}
    for run, values in content["runs"].items():
        _check_fields(values, Run, f"{path}: run '{run}'")
        runs[run] = Run(
            config=values["config"],
            label=values.get("label", run),
            overrides=_words(values.get("overrides", {})),
            seeds=tuple(values.get("seeds", ())),
        )
    pairs = tuple((str(one), str(other)) for one, other in content.get("pairs", ()))
    for unknown in {name for pair in pairs for name in pair} - set(runs):
        raise StudyError(f"{path}: 'pairs' names the run '{unknown}', which is not in 'runs'.")
    return Study(
        title=content["title"],
        runs=runs,
        metrics=content["metrics"],
        seeds=tuple(content.get("seeds", (1, 2, 3))),
        pairs=pairs,
        overrides=_words(content.get("overrides", {})),
    )


def _check_fields(content: Any, kind: type, where: str) -> None:
    known = {entry.name for entry in fields(kind)}
    needed = {"title", "runs", "metrics"} if kind is Study else {"config"}
    if not isinstance(content, dict) or set(content) - known or needed - set(content):
        raise StudyError(
            f"{where}: must be a mapping with {', '.join(sorted(needed))} and only keys from "
            f"{', '.join(sorted(known))}."
        )


def _words(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(word) for pair in overrides.items() for word in pair)


class Trainings:
    """Trains runs in parallel, each in a process; all of them can be stopped."""

    def __init__(self, study: Study, output: Path, threads: int, overrides: Sequence[str]) -> None:
        """
        Args:
            study: the study.
            output: folder with a subfolder RUN_seedSEED for each run.
            threads: number of threads of each process.
            overrides: of all configs, after those of the study.
        """
        self._study = study
        self._output = output
        self._threads = threads
        self._overrides = tuple(overrides)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def folder(self, name: str, seed: int) -> Path:
        """The output folder of a run."""
        return self._output / f"{name}_seed{seed}"

    def arguments(self, name: str, seed: int) -> list[str]:
        """The arguments of ``train_net.py``, without OUTPUT_DIR."""
        run = self._study.runs[name]
        overrides = (*self._study.overrides, *run.overrides, *self._overrides)
        return ["--config-file", run.config, "SEED", str(seed), *overrides]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to all trainings, which then write a checkpoint; no other one starts."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.send_signal(number)

    def train(self, name: str, seed: int) -> bool:
        """Train and evaluate, resuming a stopped run; returns whether it succeeded.

        Raises:
            StudyError: the folder has a run of another config, or with other overrides.
        """
        folder = self.folder(name, seed)
        arguments = self.arguments(name, seed)
        self._claim(folder, arguments)
        if results_of(folder) is not None:
            return True
        command = [sys.executable, str(ROOT / "train_net.py"), "--resume", *arguments]
        started = time.monotonic()
        with (folder / "train.out").open("ab") as log, self._lock:
            if self._stopped:
                return False
            process = subprocess.Popen(
                [*command, "OUTPUT_DIR", str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | _thread_variables(self._threads),
                start_new_session=True,  # Ctrl-C reaches it only through stop()
            )
            self._processes.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        with self._lock:
            process.returncode = os.waitstatus_to_exitcode(status)
            self._processes.remove(process)
        earlier = _read(folder / USAGE_FILE)
        used = {
            "seconds": time.monotonic() - started + earlier.get("seconds", 0),
            "cpu_seconds": usage.ru_utime + usage.ru_stime + earlier.get("cpu_seconds", 0),
            "peak_gib": max(_gib(usage.ru_maxrss), earlier.get("peak_gib", 0)),
        }
        (folder / USAGE_FILE).write_text(json.dumps(used))
        return process.returncode == 0 and results_of(folder) is not None

    def _claim(self, folder: Path, arguments: list[str]) -> None:
        """Record a run's arguments, and the commit at its start."""
        folder.mkdir(parents=True, exist_ok=True)
        noted = _read(folder / COMMAND_FILE)
        if not noted:
            noted = {"arguments": arguments, "commit": commit(), "threads": self._threads}
            (folder / COMMAND_FILE).write_text(json.dumps(noted))
        elif noted["arguments"] != arguments:
            raise StudyError(
                f"{folder} has a run of {' '.join(noted['arguments'])}, not of "
                f"{' '.join(arguments)}. Move it away or use another --output."
            )


def results_of(folder: Path) -> dict[str, float] | None:
    """The last results of a finished run, with its resources; None if it is not finished.

    A run stopped in its last evaluation is not finished: its results are those of an earlier step.
    """
    if not (folder / "model_final.pth").is_file() or not (folder / "metrics.json").is_file():
        return None
    found: dict[str, float] = {}
    steps = []
    trained, evaluated = 0, -1
    for line in (folder / "metrics.json").read_text().splitlines():
        entry = json.loads(line)
        results = {name: value for name, value in entry.items() if "/" in name}
        found |= results
        steps += [entry["time"]] if "time" in entry else []
        trained = max(trained, entry["iteration"])
        evaluated = max(evaluated, entry["iteration"]) if results else evaluated
    if evaluated < trained:
        return None
    if steps:
        found["seconds_per_step"] = sorted(steps)[len(steps) // 2]
    return found | _read(folder / USAGE_FILE)


def commit() -> str:
    """The repository's commit, with a + if files differ from it; "" outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short=10", "HEAD") + dirty


def collect(
    study: Study, trainings: Trainings, jobs: Sequence[tuple[str, int]], argv: Sequence[str]
) -> dict[str, Any]:
    """Collect the report for ``benchmarks.comparison`` and the JSON file.

    Returns:
        "title", "date", "command", "machine", "metrics" (title of each that is shown), "pairs" and
        "runs": for each its "label", "config", "overrides", "commits" and "seeds", all results of
        each seed that is finished.
    """
    runs: dict[str, dict[str, Any]] = {}
    for name, seed in jobs:
        folder = trainings.folder(name, seed)
        arguments = trainings.arguments(name, seed)
        run = runs.setdefault(
            name,
            {
                "label": study.runs[name].label,
                "config": study.runs[name].config,
                "overrides": arguments[4:],
                "commits": [],
                "seeds": {},
            },
        )
        results = results_of(folder)
        if results is not None:
            run["seeds"][str(seed)] = {
                # JSON has no NaN, the value of undefined results such as the AP of absent sizes.
                key: _rounded(value)
                for key, value in results.items()
                if math.isfinite(value)
            }
            noted = _read(folder / COMMAND_FILE).get("commit")
            run["commits"] += [noted] if noted not in run["commits"] else []
    return {
        "title": study.title,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/study.py", *argv]),
        "machine": machine("cpu"),
        "metrics": dict(study.metrics),
        "pairs": [list(pair) for pair in study.pairs if set(pair) <= set(runs)],
        "runs": runs,
    }


def write(report: Mapping[str, Any], base: Path) -> str:
    """Write BASE.md, BASE.json and BASE.svg; returns the tables."""
    text = render(report)
    base.parent.mkdir(parents=True, exist_ok=True)
    base.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    base.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report, base.with_suffix(".svg"))
    return text


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="study.py STUDY [options] [KEY VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="name or file of a study, or results to redraw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="replace the study's")
    parser.add_argument("--runs", nargs="+", default=[], help="names of runs; default: all")
    parser.add_argument("--workers", type=int, default=1, help="parallel trainings (1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each training (1)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: output/study/NAME")
    parser.add_argument("--collect", action="store_true", help="do not train")
    # Split off here, as "--runs a b KEY VALUE" would parse them as runs.
    first = next((i for i, word in enumerate(argv) if OVERRIDE.fullmatch(word)), len(argv))
    args = parser.parse_args(argv[:first])
    args.overrides = argv[first:]
    if len(args.overrides) % 2:
        parser.error(f"overrides must be pairs KEY VALUE, got {' '.join(args.overrides)}")
    if min(args.workers, args.threads) < 1:
        parser.error("--workers and --threads must be at least 1")
    return args


def run(argv: Sequence[str]) -> int:
    """Run the program, without the handling of errors; returns the exit status."""
    args = parse(argv)
    name = Path(args.study).stem
    if args.study.endswith(".json") and "machine" in (report := _read(Path(args.study))):
        print(write(report, (args.output or Path("output/study") / name) / name))
        return 0
    study = read_study(args.study)
    for unknown in set(args.runs) - set(study.runs):
        raise StudyError(f"The study has no run '{unknown}'; it has {', '.join(study.runs)}.")
    output = (args.output or Path("output/study") / name).resolve()
    jobs = study.jobs(args.runs or list(study.runs), args.seeds)
    trainings = Trainings(study, output, args.threads, args.overrides)
    failed = [] if args.collect else _train_all(trainings, jobs, args.workers)
    print(write(collect(study, trainings, jobs, _without_output(argv)), output / name))
    return int(bool(failed))


def _train_all(
    trainings: Trainings, jobs: Sequence[tuple[str, int]], workers: int
) -> list[tuple[str, int]]:
    """Train; returns the failed jobs, after printing a message for each."""

    def one(job: tuple[str, int]) -> bool:
        # One write, as workers print in parallel.
        print(f"{job[0]}, seed {job[1]}: {trainings.folder(*job)}\n", end="", flush=True)
        worked = trainings.train(*job)
        if not worked:
            log = trainings.folder(*job) / "train.out"
            print(f"{job[0]}, seed {job[1]}: not finished; see {log}", file=sys.stderr, flush=True)
        return worked

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)
    }
    pool = ThreadPoolExecutor(workers)
    try:
        results = list(pool.map(one, jobs))
    except BaseException:
        trainings.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for number, handler in before.items():
            signal.signal(number, handler)
    return [job for job, worked in zip(jobs, results, strict=True) if not worked]


def _without_output(argv: Sequence[str]) -> list[str]:
    """The command without paths of this machine."""
    words = list(argv)
    if "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    return [word for word in words if word != "--collect"]


def _thread_variables(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _gib(peak: int) -> float:
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
