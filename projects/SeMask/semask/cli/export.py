"""``semask export``: a model as an ONNX or a torch.export file."""

import argparse
import importlib.util
import os

from semask.errors import ConfigError
from semask.inference.export import largest_difference, save_onnx, save_program
from semask.inference.predictor import Predictor
from semask.tasks import build_task

WRITERS = {".onnx": save_onnx, ".pt2": save_program}


def run(args: argparse.Namespace) -> int:
    """Write the file, compare it, and say so; returns the exit status."""
    suffix = os.path.splitext(args.output)[1]
    if suffix not in WRITERS:
        raise ConfigError(f"--output '{args.output}' has to end in {' or '.join(WRITERS)}.")
    predictor = Predictor(args.config, args.weights, device="cpu", overrides=args.opts)
    height, width = args.size or build_task(predictor.cfg).training_size()
    size = (int(height), int(width))
    WRITERS[suffix](predictor.model, size, args.output)
    channels = len(predictor.cfg.MODEL.PIXEL_MEAN)
    order = f"{predictor.cfg.INPUT.FORMAT}, " if channels == 3 else ""
    print(f"Input: image (1, {channels}, {size[0]}, {size[1]}), {order}0..255")
    print(f"Output: logits (1, {len(predictor.class_names)}, {size[0]}, {size[1]})")
    if suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
        print("Not compared with the model: onnxruntime is not installed.")
    else:
        difference = largest_difference(predictor.model, size, args.output)
        print(f"Largest difference from the model's logits: {difference:.1e}")
    print(args.output)
    return 0
