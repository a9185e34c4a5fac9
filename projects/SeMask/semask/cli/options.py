"""Options that several sub-commands of ``semask`` share. Imports only the standard library."""

import argparse
import os
import sys

KEY_VALUE = "KEY VALUE"


def add_config(
    parser: argparse.ArgumentParser,
    text: str = "a file or the name of a shipped config",
    *,
    required: bool = False,
) -> None:
    """Add the model's config as an option."""
    parser.add_argument("--config", "--config-file", metavar="CONFIG", required=required, help=text)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add overrides of the config, after --opts."""
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar=KEY_VALUE, help="overrides of the config"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add a trained model: its config, weights and overrides."""
    add_config(parser, required=True)
    parser.add_argument("--weights", required=True, help="a checkpoint of that model")
    add_overrides(parser)


def add_predictor(parser: argparse.ArgumentParser) -> None:
    """A trained model, and the device to predict on."""
    add_model(parser)
    parser.add_argument("--device", help="default: a GPU where there is one, else the CPU")


def add_min_score(parser: argparse.ArgumentParser, text: str = "of drawn instances") -> None:
    """The minimum score of drawn instances."""
    help_text = f"{text} (default: %(default)s)"
    parser.add_argument("--min-score", type=float, default=0.5, help=help_text)


def add_size(parser: argparse.ArgumentParser, text: str) -> None:
    """The height and width of an image, in pixels."""
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=text)


def add_configured(parser: argparse.ArgumentParser) -> None:
    """The config of a model without weights, and overrides, both without an option."""
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("opts", nargs="*", metavar=KEY_VALUE, help="overrides of the config")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of Detectron2's ``default_argument_parser``, and a positional config."""
    parser.add_argument(
        "opts", nargs="*", metavar=f"[CONFIG] {KEY_VALUE}", help="the config, and overrides of it"
    )
    add_config(parser, "the same as CONFIG")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="per machine; 0 = the CPU")
    parser.add_argument("--num-machines", type=int, default=1, help="in the run")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    # The same port for every run of a user, as in Detectron2, so that leftover processes of a
    # killed run are noticed.
    user = os.getuid() if sys.platform != "win32" else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + hash(user) % 2**14}",
        help="address of the process group (default: %(default)s)",
    )
