#!/usr/bin/env python3
"""What a dataset's files are like, and what is wrong with them.

    python projects/SeMask/tools/check_dataset.py ade20k_raw_sem_seg_val
    python projects/SeMask/tools/check_dataset.py --images DIR --labels DIR --classes road car tree
    python projects/SeMask/tools/check_dataset.py --images DIR --annotations FILE.json
    python projects/SeMask/tools/check_dataset.py --config-file CONFIG [KEY VALUE ...]

The first form takes registered datasets, the last one those of a config's DATASETS.TRAIN and TEST;
--annotations is a file in COCO's format for detection. Every image and label map is read as
training reads it. The report lists files without counterpart, unreadable files, modes and sizes,
sizes that differ between an image and its label map, label values that are no class, and how often
each class occurs; for instances, boxes outside, polygons and masks that cannot be used, ids that
are unknown or there twice, and images without annotations. Exit status: 0; 1 where something is
wrong; 2 for a mistake in the arguments, or where --picture or --json cannot be written.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial

from tqdm import tqdm

import semask
from semask.data.checks.instance_report import InstanceDatasetReport
from semask.data.checks.instances import check_instance_dataset, has_instances
from semask.data.checks.report import DatasetReport
from semask.data.checks.semantic import check_dataset, evenly_spaced, list_dataset
from semask.data.datasets import PairingError
from semask.data.datasets.folder import IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from semask.errors import ConfigError, DataError
from semask.report.panels import save_picture
from semask.report.samples import render_instance_samples, render_samples
from semask.utils.files import replacing

FOLDER = "folder"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="datasets (or KEY VALUE pairs)")
    parser.add_argument("--config-file", metavar="CONFIG", help="a file or a shipped config's name")
    parser.add_argument("--images", metavar="DIR", help="folder of an own dataset's images")
    parser.add_argument("--labels", metavar="DIR", help="folder of its label maps")
    parser.add_argument("--annotations", metavar="FILE", help="or its instances, in COCO's format")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="its class names")
    parser.add_argument("--num-classes", type=int, metavar="K", help="or just their number")
    parser.add_argument("--ignore", type=int, default=255, help="its ignore value (255)")
    parser.add_argument("--image-ext", nargs="+", default=IMAGE_EXTENSIONS, metavar="EXT")
    parser.add_argument("--label-ext", nargs="+", default=LABEL_EXTENSIONS, metavar="EXT")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="look at N images, not at all"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw some images and label maps (PNG)")
    parser.add_argument("--rows", type=int, default=6, metavar="N", help="how many (6)")
    parser.add_argument("--json", metavar="FILE", help="write the report there as well")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), metavar="N")
    return parser


def dataset_names(args: argparse.Namespace) -> list[str]:
    """The datasets that the arguments mean, all of them registered.

    Raises:
        ConfigError: the arguments do not name any, or contradict each other.
    """
    if min(args.sample, args.rows - 1, args.threads - 1) < 0:
        raise ConfigError("--sample cannot be negative; --rows and --threads are at least 1.")
    own = (args.images, args.labels or args.annotations)
    if sum((bool(args.names) and not args.config_file, bool(args.config_file), any(own))) != 1:
        raise ConfigError(
            "Give names of datasets, or --config-file, or --images and --labels or --annotations."
        )
    if args.config_file:
        cfg = semask.load_config(semask.config_path(args.config_file), args.names)
        return list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
    if args.names:
        return args.names
    if args.annotations:
        if not args.images or args.labels or args.classes or args.num_classes:
            raise ConfigError("--annotations goes with --images alone: the file has the classes.")
        semask.data.register_coco_folder(FOLDER, args.images, args.annotations)
        return [FOLDER]
    if not all(own) or bool(args.classes) == bool(args.num_classes):
        raise ConfigError("An own dataset needs --images, --labels, --classes or --num-classes.")
    classes = args.classes or [f"class {index}" for index in range(args.num_classes)]
    try:
        semask.data.register_folder(
            FOLDER, *own, classes, args.ignore, image_ext=args.image_ext, label_ext=args.label_ext
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return [FOLDER]


def draw(name: str, rows: int, path: str) -> bool:
    """Write a picture of some images; whether any of them can be drawn."""
    try:
        records = list_dataset(name)
    except PairingError as error:
        records = error.records
    except DataError:  # It is in the report.
        return False
    render = render_instance_samples if has_instances(name) else render_samples
    picture = render(name, evenly_spaced(records, rows))
    if picture is not None:
        save_picture(picture, path)
    return picture is not None


def picture_path(path: str, name: str, number: int) -> str:
    """Where the picture of a dataset goes: each has a file of its own."""
    stem, suffix = os.path.splitext(path)
    return path if number == 1 else f"{stem}_{name}{suffix or '.png'}"


def run(argv: Sequence[str] | None = None) -> int:
    """The whole program; returns its exit status."""
    args = build_parser().parse_intermixed_args(argv)
    reports: list[DatasetReport | InstanceDatasetReport] = []
    try:
        names = dataset_names(args)
        for name in names:
            bar = partial(tqdm, desc=name, unit="image", disable=None, leave=False)
            check = check_instance_dataset if has_instances(name) else check_dataset
            report = check(name, sample=args.sample, threads=args.threads, progress=bar)
            reports.append(report)
            print(report.text(), flush=True)
            if args.picture:
                path = picture_path(args.picture, name, len(names))
                if draw(name, args.rows, path):
                    print(f"Picture: {path}")
            print()
        if args.json:
            with replacing(args.json) as file:
                file.write(json.dumps([report.as_dict() for report in reports], indent=1).encode())
    except (ConfigError, OSError) as error:  # OSError: --picture or --json cannot be written
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return int(any(report.problems for report in reports))


if __name__ == "__main__":
    sys.exit(run())
