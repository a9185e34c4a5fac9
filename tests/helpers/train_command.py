"""``train_net.py`` on the tiny dataset, in the process of the test."""

from pathlib import Path
from typing import Any

import train_net

import tiny


def run(folder: Path, *arguments: Any, config: str | None = None) -> int:
    """Run the program; its exit status.

    Args:
        folder: OUTPUT_DIR is its "out", where the arguments name no other.
        arguments: flags and KEY VALUE pairs, in any order.
        config: its config file; None = the tiny one.
    """
    file = config or tiny.write_config(folder / "config.yaml")
    options = [str(argument) for argument in arguments]
    flags = [option for option in options if option.startswith("--")]
    keys = [option for option in options if not option.startswith("--")]
    out = [] if "OUTPUT_DIR" in keys else ["OUTPUT_DIR", str(folder / "out")]
    return train_net.run(["--config-file", file, *flags, *out, *keys])
