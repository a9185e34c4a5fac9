"""``semask fit``: what a training needs of a device's memory, and what makes it fit."""

import argparse
import re

from semask.config import load_config
from semask.engine.fit import GIB, Fit, device_memory, evaluation_text
from semask.errors import ConfigError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def run(args: argparse.Namespace) -> int:
    """Print the table and the advice; returns 0 where something fits, else 1."""
    cfg = load_config(args.config, args.opts)
    limit = parse_size(args.memory) if args.memory else device_memory(cfg.MODEL.DEVICE)
    fit = Fit(cfg, limit, devices=args.num_gpus)
    print(fit.table(), "", fit.parts(), sep="\n")
    print(evaluation_text(cfg, tuple(args.size) if args.size else None))
    print(f"({cfg.MODEL.DEVICE}, {limit / GIB:.1f} GiB)", "", fit.advice(), sep="\n")
    return 0 if fit.plans() else 1


def parse_size(text: str) -> int:
    """Bytes from a number with a unit, such as 24GiB, 24G or 16000M.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--memory '{text}' is no size: give for example 24GiB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])
