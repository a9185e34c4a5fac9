"""``semask fit``: the device memory of a training, and settings that make it fit."""

import argparse

from semask.config import load_config
from semask.engine.fit import GIB, Fit, device_memory, evaluation_text
from semask.utils.text import parse_size


def run(args: argparse.Namespace) -> int:
    """Print the table and the advice; returns 0 if any batch size fits, else 1."""
    cfg = load_config(args.config, args.opts)
    limit = parse_size(args.memory, "--memory") if args.memory else device_memory(cfg.MODEL.DEVICE)
    fit = Fit(cfg, limit, devices=args.num_gpus)
    print(fit.table(), "", fit.parts(), sep="\n")
    print(evaluation_text(cfg, tuple(args.size) if args.size else None))
    print(f"({cfg.MODEL.DEVICE}, {limit / GIB:.1f} GiB)", "", fit.advice(), sep="\n")
    return 0 if fit.plans() else 1
