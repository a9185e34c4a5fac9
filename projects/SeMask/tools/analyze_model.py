#!/usr/bin/env python3
"""Parameters, arithmetic and activation memory of a model, module by module.

    python projects/SeMask/tools/analyze_model.py ade20k/semask_swin_tiny_fpn
    python projects/SeMask/tools/analyze_model.py CONFIG --size 640 640 --depth 4
    python projects/SeMask/tools/analyze_model.py CONFIG --device cuda --batch-size 16
    python projects/SeMask/tools/analyze_model.py CONFIG --json MODEL.SWIN.EMBED_DIM 64

CONFIG is a file, or the name of a shipped config. Without --device the shapes alone are followed:
no GPU, no weights and no memory are needed, whatever the size of the model; a detector runs on the
CPU, as which boxes it keeps depends on their values. Exit status: 0; 2 for
a mistake in the config or the arguments.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from semask import config_path, load_config
from semask.engine.analysis import analyze_model
from semask.errors import ConfigError


def run(argv: Sequence[str] | None = None) -> int:
    """The whole program; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the training crop"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="of the training step")
    parser.add_argument("--device", help="of the training step (default: meta; cpu for detectors)")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules to list")
    parser.add_argument("--json", action="store_true", help="every module, as JSON")
    args = parser.parse_intermixed_args(argv)
    try:
        cost = analyze_model(
            load_config(config_path(args.config), args.opts),
            None if args.size is None else (args.size[0], args.size[1]),
            batch_size=args.batch_size,
            device=args.device,
        )
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    print(json.dumps(cost.as_dict(), indent=2) if args.json else cost.table(args.depth))
    return 0


if __name__ == "__main__":
    sys.exit(run())
