"""``semask demo``: a page to try a model."""

import argparse
import math
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from semask.cli.predict import load_predictor
from semask.demo.answer import Demo, Limits
from semask.demo.page import check_gradio, serving
from semask.engine.launch.ending import handled
from semask.errors import ConfigError
from semask.inference.predictor import ImagePredictor
from semask.utils.text import parse_size

LOCAL = ("127.0.0.1", "localhost", "::1")


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns 0."""
    if not 0 <= args.min_score <= 1:
        raise ConfigError(f"--min-score is {args.min_score}; it must be between 0 and 1.")
    if not 0 < args.max_megapixels < math.inf or args.max_frames < 1:
        raise ConfigError("--max-megapixels and --max-frames must be greater than 0.")
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ConfigError(f"--port is {args.port}; it must be between 1 and 65535.")
    size = parse_size(args.max_size, "--max-size")
    check_gradio()
    predictor = load_predictor(args)
    demo = Demo(predictor, Limits(round(args.max_megapixels * 1e6), args.max_frames))
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    with (
        handled(stop, (signal.SIGINT, signal.SIGTERM)),
        serving(
            demo,
            facts=_facts(predictor, args.weights),
            host=args.host,
            port=args.port,
            max_size=size,
            min_score=args.min_score,
        ) as url,
    ):
        if args.host not in LOCAL:
            print(
                f"Note: anyone who can reach {args.host} can use the page; it has no password.",
                file=sys.stderr,
            )
        print(f"{url} (stop with Ctrl-C)", flush=True)
        stopped.wait()
    return 0


def _facts(predictor: ImagePredictor, weights: str) -> str:
    model = predictor.cfg.MODEL
    name = f"{model.META_ARCHITECTURE} with {model.BACKBONE.NAME}"
    return f"{predictor.cfg.TASK.capitalize()} segmentation: {name}, {Path(weights).name}"
