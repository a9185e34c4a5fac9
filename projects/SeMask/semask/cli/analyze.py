"""``semask analyze``: parameters, multiply-adds and activation memory of a model."""

import argparse
import json

from semask.config import load_config
from semask.engine.analysis import analyze_model


def run(args: argparse.Namespace) -> int:
    """Print the table, or all modules as JSON; returns the exit status."""
    cost = analyze_model(
        load_config(args.config, args.opts),
        None if args.size is None else (args.size[0], args.size[1]),
        batch_size=args.batch_size,
        device=args.device,
    )
    print(json.dumps(cost.as_dict(), indent=2) if args.json else cost.table(args.depth))
    return 0
