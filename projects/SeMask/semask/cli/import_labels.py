"""``semask import``: convert labels of other tools into a dataset to train on."""

import argparse
import os
import re
import shlex
from collections import Counter
from functools import partial
from pathlib import Path

from tqdm import tqdm

from semask.cli.check import run as run_check
from semask.cli.main import parse
from semask.data.importers import Options, Result, convert_labels
from semask.data.importers.contract import Note
from semask.data.importers.conversion import NOTES_FILE, SPLIT_FILE
from semask.utils.text import pluralize, table

SMALL = {
    "folder": "own_dataset/semask_small_example",
    "coco": "own_dataset/semask_coco_small_example",
}
LARGE = {"folder": "own_dataset/semask_example", "coco": "own_dataset/semask_coco_example"}

WRITTEN = {
    "folder": "Written as label maps; --to coco writes instances, if there are any.",
    "coco": "Written as instances; --to folder writes label maps.",
}

# Number of notes that are printed; the file has all.
SHOWN = 8


def summary(result: Result) -> str:
    """What was imported for each class, and what was left out."""
    parts = ", ".join(f"{count} {part}" for part, count in result.images.items())
    total = max(1, sum(count for _, _, count in result.counts))
    rows = [
        (name, images, f"{count:,}", f"{100 * count / total:.2f}")
        for name, images, count in result.counts
    ]
    counts = table(rows, ["class", "images", result.unit, "%"])
    lines = [f"{result.format}: {result.evidence}.", WRITTEN[result.layout], "", counts, ""]
    lines.append(
        f"{pluralize(sum(result.images.values()), 'image')} ({parts}), listed in "
        f"{os.path.join(os.path.relpath(result.folder), SPLIT_FILE)}."
    )
    return "\n".join(lines + _note_lines(result))


def _note_lines(result: Result) -> list[str]:
    if not result.notes:
        return ["Nothing was left out or changed."]
    kinds = Counter(note.kind for note in result.notes)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    path = os.path.join(os.path.relpath(result.folder), NOTES_FILE)
    lines = [f"{counted}, listed in {path}:"]
    alike: dict[tuple[bool, str], list[Note]] = {}
    for note in result.notes:
        key = (note.kind != "left out", re.sub(r"'[^']*'|\d+", "", note.reason))
        alike.setdefault(key, []).append(note)
    order = [alike[key] for key in sorted(alike, key=lambda key: key[0])]
    for first, *others in order[:SHOWN]:
        more = f", and {len(others)} more like it" if others else ""
        lines.append(f"  {first.kind}: {first.file}: {first.reason}{more}")
    return lines + ([f"  ... and more of {len(order) - SHOWN} kinds"] if order[SHOWN:] else [])


def commands(result: Result) -> str:
    """The commands to view the data and to train on it."""
    given = result.config_keys()
    picture = os.path.join(os.path.relpath(result.folder), "samples.png")
    small, large = SMALL[result.layout], LARGE[result.layout]
    look = ["semask", "check", "--config", small, *given, "--picture", picture]
    return "\n".join(
        [
            "View the data:",
            f"  {shlex.join(look)}",
            "Train a small model, in minutes on a CPU; or SeMask-T, on a GPU:",
            f"  {shlex.join(['semask', 'train', small, *given])}",
            f"  {shlex.join(['semask', 'train', large, *given])}",
        ]
    )


def run(args: argparse.Namespace) -> int:
    """Import, check, and print the next commands; returns the exit status."""
    options = Options(
        format=args.format,
        layout=args.to,
        images=Path(args.images) if args.images else None,
        palette=Path(args.palette) if args.palette else None,
        classes=args.classes,
        unlabelled=args.unlabelled,
        val=args.val,
        seed=args.seed,
        link=args.link,
    )
    bar = partial(tqdm, desc="importing", unit="image", disable=None, leave=False)
    result = convert_labels(args.path, args.output, options, progress=bar)
    print(summary(result), end="\n\n", flush=True)
    status = run_check(parse("check", ["--config", SMALL[result.layout], *result.config_keys()]))
    print(f"\n{commands(result)}")
    return status
