#!/usr/bin/env python3
"""Write the inference path of a trained model as an ONNX or a torch.export file.

    python projects/SeMask/tools/export_model.py --config CONFIG --weights model_final.pth \
        --output model.onnx
    python projects/SeMask/tools/export_model.py --config CONFIG --weights model_final.pth \
        --output model.pt2 --size 512 683

CONFIG is a file, or the name of a shipped config. Input "image": (1, 3, H, W) float32, 0..255, in
the config's channel order (RGB in the shipped ones), resized to the fixed --size by the caller.
Output "logits": (1, K, H, W). The file is compared with the model before the program ends; ONNX
needs the packages onnx, onnxscript and, for the comparison, onnxruntime. Exit status: 0; 2 for a
mistake in config, checkpoint or arguments, or a missing package.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from semask import Predictor
from semask.errors import CheckpointError, ConfigError
from semask.inference.export import ExportError, largest_difference, save_onnx, save_program

WRITERS = {".onnx": save_onnx, ".pt2": save_program}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a file or the name of a shipped config")
    parser.add_argument("--weights", required=True, help="a checkpoint of that model")
    parser.add_argument("--output", required=True, help="the file to write: .onnx or .pt2")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the image, in pixels; default: the training crop",
    )
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides of the config"
    )
    return parser


def export(args: argparse.Namespace) -> None:
    """Write the file, compare it, and say so."""
    suffix = os.path.splitext(args.output)[1]
    if suffix not in WRITERS:
        raise ConfigError(f"--output '{args.output}' has to end in {' or '.join(WRITERS)}.")
    predictor = Predictor(args.config, args.weights, device="cpu", overrides=args.opts)
    height, width = args.size or predictor.cfg.INPUT.CROP.SIZE
    size = (int(height), int(width))
    WRITERS[suffix](predictor.model, size, args.output)
    print(f"Input: image (1, 3, {size[0]}, {size[1]}), {predictor.cfg.INPUT.FORMAT}, 0..255")
    print(f"Output: logits (1, {len(predictor.class_names)}, {size[0]}, {size[1]})")
    if suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
        print("Not compared with the model: onnxruntime is not installed.")
    else:
        difference = largest_difference(predictor.model, size, args.output)
        print(f"Largest difference from the model's logits: {difference:.1e}")
    print(args.output)


def run(argv: Sequence[str] | None = None) -> int:
    """The whole program; returns its exit status."""
    args = parser().parse_args(argv)
    try:
        export(args)
    except (ConfigError, CheckpointError, ExportError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
