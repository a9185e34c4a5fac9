"""``semask predict``: segment images and videos, or find the instances in them."""

import argparse
import glob
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from semask.data.checks.report import dark_words
from semask.data.datasets.folder import IMAGE_EXTENSIONS
from semask.data.reading import is_nearly_black
from semask.errors import ConfigError, DataError
from semask.inference.prediction import InstancePrediction, Prediction, panoptic_picture
from semask.inference.predictor import ImagePredictor, read_config
from semask.inference.video import (
    VIDEO_EXTENSIONS,
    VideoReader,
    VideoWriter,
    writing_video,
)
from semask.report.panels import save_picture
from semask.tasks import build_task
from semask.utils.files import replacing, without_suffixes
from semask.visualize.drawing import draw_legend


def find_inputs(inputs: Sequence[str], output: Path) -> dict[Path, str]:
    """The files to segment, and the name of each in the output folder.

    Args:
        inputs: files, folders and patterns.
        output: a folder that is left out where it lies in one of the others.

    Returns:
        {file: path without suffix below the common folder of all inputs}, each different; files
        that would have the same, or that of another's frames, keep the whole name ("a.jpg").

    Raises:
        DataError: an input is not there, or a folder or a pattern has nothing to segment.
    """
    files: dict[Path, None] = {}  # in order, each once
    folders = []
    for given in inputs:
        is_file = os.path.isfile(given)
        found = [_absolute(given)] if is_file else _search(given, _absolute(output))
        files.update(dict.fromkeys(found))
        folders += [_absolute(given)] if os.path.isdir(given) else [file.parent for file in found]
    common = os.path.commonpath(folders)
    whole = {file: file.relative_to(common) for file in files}
    videos = [name for file, name in whole.items() if _is_video(file)]
    short = without_suffixes(whole.values(), folders=videos)
    return {file: str(short[name]) for file, name in whole.items()}


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEO_EXTENSIONS


def _absolute(path: str | Path) -> Path:
    """Without "..", and with symbolic links as they are."""
    return Path(os.path.abspath(path))


def _search(given: str, output: Path) -> list[Path]:
    """What can be segmented in a folder, or among the fits of a pattern."""
    pattern = os.path.join(glob.escape(given), "**", "*") if os.path.isdir(given) else given
    fits = [_absolute(fit) for fit in sorted(glob.glob(pattern, recursive=True))]
    if not fits and not os.path.isdir(given):
        raise DataError(f"There is no file or folder '{given}', and as a pattern it fits nothing.")
    extensions = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)
    found = [
        file
        for file in fits
        if file.suffix.lower() in extensions and file.is_file() and not file.is_relative_to(output)
    ]
    if not found:
        raise DataError(
            f"There is nothing to segment in '{given}': no file's name ends in "
            f"{', '.join(extensions)}."
        )
    return found


def run(args: argparse.Namespace) -> int:
    """Segment everything; returns the exit status."""
    if not 0 <= args.alpha <= 1:
        raise ConfigError(f"--alpha is {args.alpha}; it has to lie in 0..1.")
    inputs = find_inputs(args.inputs, Path(args.output))
    predictor = load_predictor(args)
    problems = dark = 0
    described = False
    for file, name in tqdm(inputs.items(), unit="file", disable=None):
        try:
            if _is_video(file):
                last = segment_video(predictor, file, name, args)
            else:
                last = segment_image(predictor, file, name, args)
                dark += is_nearly_black(last.image)
            described = described or describe_classes(last, args.output)
        except DataError as error:
            tqdm.write(f"Left out: {error}", file=sys.stderr)
            problems += 1
    if dark:
        print(f"Note: {dark_words(dark, len(inputs) - problems)}", file=sys.stderr)
    print(f"{len(inputs) - problems} of {len(inputs)} inputs segmented.")
    print(args.output)
    return 2 if problems else 0


def load_predictor(args: argparse.Namespace) -> ImagePredictor:
    """The one that the config is of."""
    cfg = read_config(args.config, args.opts)
    return build_task(cfg).predictor(cfg, args.weights, device=args.device, overrides=args.opts)


def segment_image(
    predictor: ImagePredictor, file: Path, name: str, args: argparse.Namespace
) -> Prediction | InstancePrediction:
    """Write the pictures and labels, or instances, of one image, and return them."""
    prediction = predictor(file, priors=args.priors)
    for kind, picture in pictures(prediction, args).items():
        save_picture(picture, str(Path(args.output) / kind / f"{name}.png"))
    save_answer(prediction, args.output, name)
    return prediction


def segment_video(
    predictor: ImagePredictor, file: Path, name: str, args: argparse.Namespace
) -> Prediction | InstancePrediction | None:
    """Write the videos of one video, a frame at a time; returns the last one's prediction."""
    prediction = None
    output = Path(args.output)
    writers: dict[str, VideoWriter] = {}
    with VideoReader(file) as frames, ExitStack() as stack:
        total = frames.num_frames or None
        progress = tqdm(frames, total=total, unit="frame", leave=False, disable=None)
        for index, frame in enumerate(progress):
            prediction = predictor(frame, priors=args.priors)
            for kind, picture in pictures(prediction, args).items():
                if kind not in writers:
                    path = output / kind / f"{name}.{args.video_format}"
                    writers[kind] = stack.enter_context(writing_video(path, frames.frame_rate))
                writers[kind].write(picture)
            if args.video_labels:
                save_answer(prediction, args.output, os.path.join(name, f"{index:06}"))
    return prediction


def describe_classes(prediction: Prediction | InstancePrediction | None, output: str) -> bool:
    """Write ``classes.json``, and ``legend.png`` where classes have colours; whether it is done."""
    if prediction is None:
        return False
    names: tuple[str, ...]
    colors: np.ndarray | None
    if isinstance(prediction, Prediction):
        names, colors = prediction.class_names, prediction.colors
        content = _with_colors(names, prediction.colors)
    else:
        ids = zip(prediction.class_names, prediction.category_ids, strict=True)
        content = [{"index": n, "name": name, "id": given} for n, (name, given) in enumerate(ids)]
        names, colors = prediction.stuff_names, prediction.stuff_colors
    description = {"classes": content}
    if isinstance(prediction, InstancePrediction) and colors is not None:
        description["stuff"] = _with_colors(names, colors)
    _save_json(description, os.path.join(output, "classes.json"))
    if colors is not None:
        save_picture(draw_legend(names, colors), os.path.join(output, "legend.png"))
    return True


def _with_colors(names: Sequence[str], colors: np.ndarray) -> list[dict[str, Any]]:
    pairs = zip(names, colors.tolist(), strict=True)
    return [{"index": index, "name": n, "color": color} for index, (n, color) in enumerate(pairs)]


def pictures(
    prediction: Prediction | InstancePrediction, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """What is drawn, by the name of its folder; (H, W, 3) uint8, RGB."""
    if isinstance(prediction, InstancePrediction):
        overlay = prediction.overlay(args.alpha, args.min_score)
    else:
        overlay = prediction.overlay(args.alpha)
    return {"overlay": overlay, **prediction.prior_pictures()}


def save_answer(prediction: Prediction | InstancePrediction, output: str, name: str) -> None:
    """Write labels, or instances and segments, of one image."""
    if isinstance(prediction, Prediction):
        save_picture(prediction.labels, os.path.join(output, "labels", f"{name}.png"))
        return
    _save_json(prediction.coco_results(name), os.path.join(output, "instances", f"{name}.json"))
    if prediction.panoptic is not None:
        path = os.path.join(output, "panoptic", name)
        save_picture(panoptic_picture(prediction.panoptic), f"{path}.png")
        _save_json(list(prediction.segments), f"{path}.json")


def _save_json(content: Any, path: str) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content).encode())
