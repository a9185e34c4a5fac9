"""``semask prepare``: create annotation files for published datasets."""

import argparse
from functools import partial

from tqdm import tqdm

from semask.data.datasets import PREPARATIONS
from semask.utils.text import pluralize


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was written; returns the exit status."""
    bar = partial(tqdm, desc=args.name, unit="image", disable=None, leave=False)
    for done in PREPARATIONS[args.name](workers=max(0, args.workers), progress=bar):
        print(f"{done.split}: {pluralize(done.images, 'image')}")
        for path in done.paths:
            print(f"  {path}{' (exists, not changed)' if path in done.kept else ''}")
    return 0
