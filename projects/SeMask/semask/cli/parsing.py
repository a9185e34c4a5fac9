"""Parsing of a sub-command's arguments. Imports only the standard library."""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Sequence

from semask.cli.arguments import COMMANDS

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


def build_parser(command: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of a sub-command, for ``parse``.

    Args:
        command: one of ``COMMANDS``.
        prog: the program's name in messages; None = "semask COMMAND".
    """
    add_arguments = COMMANDS[command]
    parser = argparse.ArgumentParser(
        prog=prog or f"semask {command}",
        description=inspect.getdoc(add_arguments),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of yours that registers a task, a decoder, a dataset, ...; can be repeated",
    )
    return parser


def parse(
    command: str, argv: Sequence[str] | None = None, prog: str | None = None
) -> argparse.Namespace:
    """Parse the arguments of a sub-command; options and KEY VALUE pairs can come in any order.

    Args:
        command: one of ``COMMANDS``.
        argv: what follows the sub-command's name; None = the arguments of this process.
        prog: as for ``build_parser``.

    Raises:
        SystemExit: with 0 after --help, with 2 for invalid arguments.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(command, prog).parse_intermixed_args(_with_negative_numbers(given))
    first = args.opts[:1] if command in ("train", "evaluate") and not args.config else []
    if first and (os.path.isfile(first[0]) or not _KEY.fullmatch(first[0].partition("=")[0])):
        args.config, *args.opts = args.opts
    return args


def _with_negative_numbers(argv: Sequence[str]) -> list[str]:
    """Rewrite KEY -1e-4 as KEY=-1e-4, which argparse does not mistake for an option."""
    joined: list[str] = []
    for token in argv:
        is_value = bool(joined) and _KEY.fullmatch(joined[-1]) is not None
        if is_value and token.startswith("-") and _is_number(token):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
