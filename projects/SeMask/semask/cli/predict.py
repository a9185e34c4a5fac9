"""``semask predict``: segment images and videos."""

import argparse
import errno
import glob
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from semask.data.checks.report import dark_words
from semask.data.datasets.folder import IMAGE_EXTENSIONS
from semask.data.reading import is_nearly_black
from semask.engine.launch.ending import is_out_of_memory
from semask.errors import ConfigError, DataError, UserError
from semask.inference.prediction import ImagePrediction
from semask.inference.predictor import ImagePredictor, read_config
from semask.inference.video import VIDEO_EXTENSIONS, VideoError, VideoReader, predict_frames
from semask.tasks import build_task
from semask.utils.files import files_below, without_suffixes
from semask.visualize.drawing import save_picture


def find_inputs(inputs: Sequence[str], output: Path) -> dict[Path, str]:
    """Find the files to segment, and name each in the output folder.

    Args:
        inputs: files, folders and patterns.
        output: a folder that is skipped if it is in one of the others.

    Returns:
        {file: path without suffix, relative to the common folder of all inputs}, all different;
        files whose names would collide, also with a video's frames, keep their suffix ("a.jpg").

    Raises:
        DataError: an input does not exist, or a folder or a pattern has nothing to segment.
    """
    files: dict[Path, None] = {}  # ordered and unique
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
    """Resolve "..", but not symbolic links."""
    return Path(os.path.abspath(path))


def _search(given: str, output: Path) -> list[Path]:
    """The files to segment in a folder, or among the matches of a pattern."""
    is_folder = os.path.isdir(given)
    listed = map(str, files_below(given)) if is_folder else glob.glob(given, recursive=True)
    fits = [_absolute(fit) for fit in sorted(listed)]
    if not fits and not is_folder:
        key = "=" in given and not given.lower().endswith((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
        hint = " Put config keys after --opts." if key else ""
        raise DataError(
            f"There is no file or folder '{given}', and as a pattern it matches nothing.{hint}"
        )
    extensions = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)
    found = [
        file
        for file in fits
        if file.suffix.lower() in extensions
        and not file.is_dir()
        and not file.is_relative_to(output)
    ]
    if not found:
        raise DataError(
            f"There is nothing to segment in '{given}': no file name ends in "
            f"{', '.join(extensions)}."
        )
    return found


def run(args: argparse.Namespace) -> int:
    """Segment all inputs; returns the exit status."""
    if not 0 <= args.alpha <= 1:
        raise ConfigError(f"--alpha is {args.alpha}; it must be between 0 and 1.")
    inputs = find_inputs(args.inputs, Path(args.output))
    predictor = load_predictor(args)
    problems = dark = 0
    described = False
    for file, name in tqdm(inputs.items(), unit="file", disable=None):
        reason = ""
        try:
            if _is_video(file):
                last = segment_video(predictor, file, name, args)
            else:
                last = segment_image(predictor, file, name, args)
                dark += is_nearly_black(last.image)
            if last is not None and not described:
                last.save_classes(args.output)
                described = True
        except (DataError, VideoError, RuntimeError, MemoryError, OSError) as error:
            reason = reason_to_skip(error, file)
            if not reason:
                raise
        if reason:  # outside the handler, whose exception holds the model's tensors
            tqdm.write(f"Skipped: {reason}", file=sys.stderr)
            problems += 1
    if dark:
        print(f"Note: {dark_words(dark, len(inputs) - problems)}", file=sys.stderr)
    print(f"{len(inputs) - problems} of {len(inputs)} inputs segmented.")
    print(args.output)
    return 2 if problems else 0


def reason_to_skip(error: Exception, file: Path) -> str:
    """Why a file cannot be segmented though others may be; "" for errors that end the program."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return (
            f"There is not enough memory for '{file}'. --opts TEST.PROTOCOL=slide and "
            "TEST.AMP.ENABLED=True need less."
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"The name of '{file}' is too long for the files that are written. Rename it."
    return ""


def load_predictor(args: argparse.Namespace) -> ImagePredictor:
    """The predictor of the config's task."""
    cfg = read_config(args.config, args.opts)
    return build_task(cfg).predictor(cfg, args.weights, device=args.device, overrides=args.opts)


def segment_image(
    predictor: ImagePredictor, file: Path, name: str, args: argparse.Namespace
) -> ImagePrediction:
    """Write the pictures and labels or instances of one image; returns the prediction."""
    prediction = predictor(file, priors=args.priors)
    for kind, picture in _pictures(prediction, args).items():
        save_picture(picture, str(Path(args.output) / kind / f"{name}.png"))
    prediction.save(args.output, name)
    return prediction


def segment_video(
    predictor: ImagePredictor, file: Path, name: str, args: argparse.Namespace
) -> ImagePrediction | None:
    """Write the output of one video, frame by frame; returns the last frame's prediction."""
    prediction = None
    with VideoReader(file) as frames, ExitStack() as stack:
        predictions = predict_frames(
            lambda frame: predictor(frame, priors=args.priors),
            frames,
            lambda found: _pictures(found, args),
            lambda kind: Path(args.output) / kind / f"{name}.{args.video_format}",
        )
        stack.callback(predictions.close)
        total = frames.num_frames or None
        progress = tqdm(predictions, total=total, unit="frame", leave=False, disable=None)
        for index, prediction in enumerate(progress):
            if args.video_labels:
                prediction.save(args.output, os.path.join(name, f"{index:06}"))
    return prediction


def _pictures(prediction: ImagePrediction, args: argparse.Namespace) -> dict[str, np.ndarray]:
    return prediction.pictures(alpha=args.alpha, min_score=args.min_score)
