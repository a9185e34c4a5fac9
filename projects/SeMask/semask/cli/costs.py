"""``semask analyze`` and ``semask fit``: the cost of a model, and the memory of its training."""

import argparse
import json

from semask.config import load_config
from semask.engine.analysis import analyze_model
from semask.engine.fit import GIB, Fit, device_memory, evaluation_text
from semask.utils.text import parse_size


def analyze(args: argparse.Namespace) -> int:
    """Print parameters, multiply-adds and activation memory by module; returns the exit status."""
    cost = analyze_model(
        load_config(args.config, args.opts),
        None if args.size is None else (args.size[0], args.size[1]),
        batch_size=args.batch_size,
        device=args.device,
    )
    print(json.dumps(cost.as_dict(), indent=2) if args.json else cost.table(args.depth))
    return 0


def fit(args: argparse.Namespace) -> int:
    """Print the memory of a training, and settings that make it fit.

    Returns:
        The exit status: 0 if any batch size fits, else 1.
    """
    cfg = load_config(args.config, args.opts)
    limit = parse_size(args.memory, "--memory") if args.memory else device_memory(cfg.MODEL.DEVICE)
    estimate = Fit(cfg, limit, devices=args.num_gpus)
    print(estimate.table(), "", estimate.parts(), sep="\n")
    print(evaluation_text(cfg, tuple(args.size) if args.size else None))
    print(f"({cfg.MODEL.DEVICE}, {limit / GIB:.1f} GiB)", "", estimate.advice(), sep="\n")
    return 0 if estimate.plans() else 1
