#!/usr/bin/env python3
"""Check and measure the models on a GPU: equality first, then speed, memory and a training.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts fixtures equality --minutes 5
    python benchmarks/gpu.py --device cpu --tiny --parts equality training

Each part is a separate process with the remaining time; one that fails or takes too long does not
end the others. Rows are stored as soon as they are measured, so the table has all rows before a
failure. Prints the tables and writes gpu.md and gpu.json to the output folder after each part.
Needs no network and no installation: with the packages in a folder FOLDER,
PYTHONPATH=FOLDER:projects/SeMask. The last part, "camvid", trains for the remaining time, if
$DETECTRON2_DATASETS has CamVid. Exit status: 0; 1 if a row or a part failed; 2 for a mistake in the
arguments.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("fixtures", "equality", "training", "inference", "large", "camvid")
# Maximum minutes of each part; camvid gets the rest.
LIMITS = {"fixtures": 3.0, "equality": 3.0, "training": 8.0, "inference": 4.0, "large": 3.0}
TITLES = {
    "fixtures": "The reference's arrays: largest error, relative to the array's scale",
    "equality": "Fast forms against the plain model: largest relative error",
    "training": "Training step with AdamW, 512 x 512",
    "inference": "Inference to logits of the image's size, 512 x 512",
    "large": "SeMask-L FPN, 640 x 640",
    "camvid": "CamVid at full size",
}
GRACE = 30.0  # seconds for a part to write its results after it is told to end


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together (25)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=16, help="images of a training step (16)")
    parser.add_argument("--tiny", action="store_true", help="small models: that it runs")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), metavar="DIR")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.minutes <= 0:
        parser.error("--batch and --minutes must be greater than 0")
    return args


def run_part(part: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part in a separate process.

    Args:
        part: its name.
        args: the command line.
        seconds: after which it is told to end.

    Returns:
        "rows", each a mapping of columns to values, "seconds" and, if it failed, "error".
    """
    rows, log = args.output / f"{part}.jsonl", args.output / f"{part}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", part, str(rows)]
    command += ["--device", args.device, "--dtype", args.dtype, "--batch", str(args.batch)]
    command += ["--seconds", f"{seconds:.0f}", *(["--tiny"] if args.tiny else [])]
    paths = [str(ROOT), str(ROOT / "projects" / "SeMask")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    started = time.monotonic()
    result: dict[str, Any] = {}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        try:
            process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            result["error"] = f"not finished after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode and "error" not in result:
        lines = log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else ""
        result["error"] = f"ended with status {process.returncode}: {last[:300]}"
    lines = rows.read_text().splitlines() if rows.is_file() else []
    result["rows"] = [json.loads(line) for line in lines]
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all parts that the arguments select.

    Returns:
        "date", "machine", "settings" and "parts", by name the results of ``run_part``.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "settings": {"device": args.device, "dtype": args.dtype, "batch": args.batch},
        "machine": machine(args),
        "parts": {},
    }
    for part in args.parts:
        left = end - time.monotonic() - GRACE
        if left <= 0:
            report["parts"][part] = {"rows": [], "error": "no time was left", "seconds": 0}
            continue
        print(f"{part}: at most {left / 60:.1f} minutes", file=sys.stderr, flush=True)
        seconds = min(left, 60 * LIMITS.get(part, args.minutes))
        report["parts"][part] = run_part(part, args, seconds)
        text = json.dumps(report, indent=1) + "\n"
        (args.output / "gpu.json").write_text(text, encoding="utf-8")
        (args.output / "gpu.md").write_text(render(report) + "\n", encoding="utf-8")
    return report


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """GPU and versions, queried in another process, so that this one does not use the GPU."""
    code = "import json, sys; from benchmarks.worker import machine; "
    code += "print(json.dumps(machine(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, args.device], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def render(report: Mapping[str, Any]) -> str:
    """Render the tables in Markdown."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.table import grid

    machine, settings = report["machine"], report["settings"]
    where = machine.get("gpu") or machine.get("processor") or machine["error"]
    lines = [
        f"{where}; Python {machine.get('python')}, PyTorch {machine.get('torch')}; "
        f"{settings['dtype']}, training batch {settings['batch']}; {report['date']}"
    ]
    for part, result in report["parts"].items():
        lines += ["", f"{TITLES[part]} ({result['seconds']:.0f} s)", ""]
        columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
        if result["rows"]:
            cells = [[_cell(row.get(column)) for column in columns] for row in result["rows"]]
            lines.append(grid(columns, cells))
        if "error" in result:
            lines.append(f"Failed: {result['error']}")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value}"


def failures(report: Mapping[str, Any]) -> list[str]:
    """The failures of each part."""
    found = []
    for part, result in report["parts"].items():
        found += [f"{part}: {result['error']}"] if "error" in result else []
        found += [
            f"{part}: {row.get('case')}: {row.get('failed')}"
            for row in result["rows"]
            if row.get("failed")
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The whole program; returns its exit status."""
    report = run(parse(argv))
    print(render(report))
    failed = failures(report)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
