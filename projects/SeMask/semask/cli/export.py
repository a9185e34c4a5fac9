"""``semask export``: export a model as an ONNX or a torch.export file."""

import argparse
import os

from semask.errors import ConfigError
from semask.inference.export import save_onnx, save_program
from semask.inference.parity import (
    can_compare,
    compare_export,
    compared_sizes,
    describe,
    save_parity,
)
from semask.inference.predictor import Predictor
from semask.tasks import build_task

WRITERS = {".onnx": save_onnx, ".pt2": save_program}


def run(args: argparse.Namespace) -> int:
    """Write the file, compare it and print the result; returns the exit status."""
    suffix = os.path.splitext(args.output)[1]
    if suffix not in WRITERS:
        raise ConfigError(f"--output '{args.output}' must end in {' or '.join(WRITERS)}.")
    predictor = Predictor(args.config, args.weights, device="cpu", overrides=args.opts)
    height, width = args.size or build_task(predictor.cfg).training_size()
    size = (int(height), int(width))
    least = WRITERS[suffix](predictor.model, size, args.output, dynamic=args.dynamic)
    channels = len(predictor.cfg.MODEL.PIXEL_MEAN)
    order = f"{predictor.cfg.INPUT.FORMAT}, " if channels == 3 else ""
    named = describe(channels, len(predictor.class_names), size, dynamic=args.dynamic)
    sides = f", sides of at least {least} pixels" if args.dynamic else ""
    print(f"Input: image {_shape(named['input'])}, {order}0..255{sides}")
    print(f"Output: logits {_shape(named['output'])}")
    found = []
    if can_compare(args.output):
        sizes = compared_sizes(size, least, dynamic=args.dynamic)
        found = compare_export(predictor.model, sizes, args.output)
        equal = 100 * min(parity.equal_labels for parity in found)
        print(f"Equal labels: {equal:.4f} %")
        difference = max(parity.largest_difference for parity in found)
        print(f"Largest difference from the model's logits: {difference:.1e}")
    else:
        print("Not compared with the model: onnxruntime is not installed.")
    if args.dynamic:
        named["input"]["least_side"] = least
    named["input"] |= {"range": [0, 255], "channel_order": predictor.cfg.INPUT.FORMAT}
    named["output"] |= {"classes": list(predictor.class_names)}
    print(save_parity(args.output, found, named))
    print(args.output)
    return 0


def _shape(described: dict[str, object]) -> str:
    shape = described["shape"]
    assert isinstance(shape, list)
    return f"({', '.join(str(side) for side in shape)})"
