"""``semask check``: check a dataset's files."""

import argparse
import json
import os
from collections.abc import Iterator
from functools import partial

from detectron2.config import CfgNode
from tqdm import tqdm

from semask.config import load_config
from semask.data import register_coco_folder, register_folder
from semask.data.bands import RGB, ImageReader
from semask.data.checks.instances import (
    InstanceDatasetReport,
    check_instance_dataset,
    has_instances,
)
from semask.data.checks.report import DatasetReport
from semask.data.checks.semantic import check_dataset, evenly_spaced, list_dataset
from semask.data.datasets import PairingError
from semask.data.datasets.folder import IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from semask.errors import ConfigError, DataError
from semask.report.panels import render_instance_samples, render_samples
from semask.tasks import build_task
from semask.utils.files import replacing
from semask.visualize.drawing import save_picture

FOLDER = "folder"


def named_datasets(args: argparse.Namespace) -> tuple[list[str], CfgNode | None]:
    """The datasets named by the arguments, all registered, and the config, if there is one.

    Raises:
        ConfigError: the arguments name no dataset, or contradict each other.
    """
    if min(args.sample, args.rows - 1, args.threads - 1) < 0:
        raise ConfigError("--sample cannot be negative; --rows and --threads are at least 1.")
    own = (args.images, args.labels or args.annotations)
    if sum((bool(args.names) and not args.config, bool(args.config), any(own))) != 1:
        raise ConfigError(
            "Pass names of datasets, or --config, or --images with --labels or --annotations."
        )
    if args.config:
        cfg = load_config(args.config, args.names)
        return list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])), cfg
    if args.names:
        return args.names, None
    if args.annotations:
        if not args.images or args.labels or args.classes or args.num_classes:
            raise ConfigError("--annotations is used with --images only: the file has the classes.")
        register_coco_folder(FOLDER, args.images, args.annotations, replace=True)
        return [FOLDER], None
    if not all(own) or bool(args.classes) == bool(args.num_classes):
        raise ConfigError(
            "Your own dataset needs --images, --labels, and --classes or --num-classes."
        )
    classes = args.classes or [f"class {index}" for index in range(args.num_classes)]
    try:
        register_folder(
            FOLDER,
            *own,
            classes,
            args.ignore,
            image_ext=args.image_ext or IMAGE_EXTENSIONS,
            label_ext=args.label_ext or LABEL_EXTENSIONS,
            replace=True,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return [FOLDER], None


def refused_by_training(cfg: CfgNode) -> Iterator[str]:
    """The problems of the config's datasets, besides single files, that a training would refuse."""
    task = build_task(cfg)
    try:
        task.check_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], eval_only=False)
    except (ConfigError, DataError) as error:
        yield str(error)
        return
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        try:
            task.check_images(name, is_train=name in cfg.DATASETS.TRAIN)
        except (ConfigError, DataError) as error:
            yield str(error)


def draw(name: str, rows: int, path: str, reader: ImageReader = RGB) -> bool:
    """Write a picture of some images; returns whether any of them can be drawn."""
    try:
        records = list_dataset(name)
    except PairingError as error:
        records = error.records
    except DataError:  # The report lists it.
        return False
    render = render_instance_samples if has_instances(name) else render_samples
    picture = render(name, evenly_spaced(records, rows), reader)
    if picture is not None:
        save_picture(picture, path)
    return picture is not None


def picture_path(path: str, name: str, number: int) -> str:
    """The picture's path for one dataset; each dataset has its own file."""
    stem, suffix = os.path.splitext(path)
    return path if number == 1 else f"{stem}_{name}{suffix or '.png'}"


def run(args: argparse.Namespace) -> int:
    """Print the reports and write the requested files; returns the exit status."""
    reports: list[DatasetReport | InstanceDatasetReport] = []
    names, cfg = named_datasets(args)
    reader = RGB if cfg is None else ImageReader.from_config(cfg)
    for index, name in enumerate(names):
        if index:
            print()
        bar = partial(tqdm, desc=name, unit="image", disable=None, leave=False)
        check = check_instance_dataset if has_instances(name) else check_dataset
        report = check(name, sample=args.sample, threads=args.threads, progress=bar, reader=reader)
        reports.append(report)
        print(report.text(), flush=True)
        if args.picture:
            path = picture_path(args.picture, name, len(names))
            if draw(name, args.rows, path, reader):
                print(f"Picture: {path}")
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps([report.as_dict() for report in reports], indent=1).encode())
    failed = any(report.problems for report in reports)
    if cfg is not None and not failed:
        refused = list(refused_by_training(cfg))
        for message in refused:
            print(f"Training would refuse this: {message}")
        failed = bool(refused)
    return int(failed)
