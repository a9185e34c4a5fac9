#!/usr/bin/env python3
"""Turn a checkpoint into this project's names and a file that holds weights alone.

    python projects/SeMask/tools/convert_checkpoint.py swin_tiny_patch4_window7_224.pth swin_t.pth
    python projects/SeMask/tools/convert_checkpoint.py URL semask_t.safetensors \\
        --config ade20k/semask_swin_tiny_fpn
    python projects/SeMask/tools/convert_checkpoint.py output/run/model_final.pth averaged.pth --ema

SOURCE is a file or URL: a published SeMask-FPN or Swin-FPN model, an ImageNet-pretrained Swin, or
a checkpoint of a run of this project. TARGET ends in .pth or .safetensors. It prints which kind
SOURCE is and what was left out. Training and evaluation also read all kinds unconverted.
Exit status: 0; 2 for a mistake, with nothing written.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import semask  # first: it makes older releases of Detectron2 importable

# isort: split
from detectron2.modeling import build_model

from semask.checkpoint import (
    CheckpointKind,
    SeMaskCheckpointer,
    convert_state_dict,
    read_checkpoint,
    write_checkpoint,
)
from semask.checkpoint.reading import parameters_by_name
from semask.errors import CheckpointError


def run(argv: Sequence[str] | None = None) -> int:
    """The whole program; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument(
        "--config", help="refuse what does not fit the model of this config (name or file)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="take the averaged weights of a run (SOLVER.EMA)"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read a .pkl of Detectron2, which can run any code: only from whom you trust",
    )
    args = parser.parse_args(argv)
    try:
        print(convert(**vars(args)))
    except (CheckpointError, semask.ConfigError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def convert(
    source: str,
    target: str,
    *,
    config: str | None = None,
    ema: bool = False,
    allow_pickle: bool = False,
) -> str:
    """Convert a checkpoint file.

    Args:
        source: file or URL.
        target: file to write; ends in ".pth" or ".safetensors".
        config: name or file of a config whose model the weights have to fit.
        ema: take the averaged weights.
        allow_pickle: also read ".pkl" files of more than NumPy arrays.

    Returns:
        What was found, written and left out, for people.

    Raises:
        CheckpointError: the source cannot be used or the target not be written.
        ConfigError: the config cannot be used.
    """
    if not target.endswith((".pth", ".safetensors")):
        raise CheckpointError(f"Target '{target}' has to end in .pth or .safetensors.")
    content = read_checkpoint(source, allow_pickle=allow_pickle)
    weights: dict[str, Tensor] = _averaged(source, content) if ema else content["model"]
    try:
        converted, kind = convert_state_dict(weights)
    except CheckpointError as error:
        raise CheckpointError(f"Checkpoint '{source}': {error}") from error
    left_out: dict[str, list[str]] = {"entries beside the weights": sorted({*content} - {"model"})}
    if kind is CheckpointKind.IMAGENET_SWIN:
        classifier = [name for name in converted if not name.startswith("backbone.")]
        converted = {name: value for name, value in converted.items() if name not in classifier}
        left_out["the classifier"] = classifier
    computed = [name for name in weights if name.endswith(("relative_position_index", "attn_mask"))]
    left_out["buffers that the model computes"] = computed
    if config is not None:
        _check(converted, config, source)
    write_checkpoint(target, {"model": converted})
    lines = [f"Found: {kind.value}", f"Written to {target}: {len(converted)} tensors"]
    lines += [
        f"Left out, {what}: {', '.join(names[:4])}{_more(names[4:])}"
        for what, names in left_out.items()
        if names
    ]
    return "\n".join(lines)


def _averaged(source: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    average = content.get("ema")
    weights = average.get("model") if isinstance(average, Mapping) else None
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(
            f"Checkpoint '{source}' has no averaged weights: its run had SOLVER.EMA.ENABLED False."
        )
    return parameters_by_name(weights, source)


def _check(weights: Mapping[str, Tensor], config: str, source: str) -> None:
    cfg = semask.load_config(semask.config_path(config))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        SeMaskCheckpointer(build_model(cfg)).check_weights(weights, source)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names)} more" if names else ""


if __name__ == "__main__":
    sys.exit(run())
