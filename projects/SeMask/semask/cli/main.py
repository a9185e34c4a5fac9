"""``semask COMMAND ...`` and ``python -m semask COMMAND ...``."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence

from semask.cli.arguments import COMMANDS
from semask.cli.parsing import parse
from semask.errors import UserError

# The module of each sub-command whose name differs.
_MODULES = {"evaluate": "train", "import": "import_labels"}
# Sub-commands that run a training or an evaluation; ``exit_statuses`` reports their errors.
_RUNS = ("train", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """The whole program.

    Args:
        argv: the sub-command and its arguments; None = those of this process.

    Returns:
        The exit status, as the help of each sub-command lists it.
    """
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {_summary(name)}" for name in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="semask",
        usage="semask COMMAND ...",
        description=f"SeMask for Detectron2.\n\n{commands}",
        epilog="'semask COMMAND --help' says more. Exit status: 0; the help of each command lists "
        "the others.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return run(args.command, args.arguments)


def run(command: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one sub-command.

    Args:
        command: its name.
        argv: what follows the name; None = the arguments of this process.
        prog: the program's name in messages.

    Returns:
        The exit status.
    """
    args = parse(command, argv, prog)
    importlib.import_module("semask.api")  # PyTorch, and Detectron2 as this project needs it
    module = importlib.import_module(f"semask.cli.{_MODULES.get(command, command)}")
    if command in _RUNS:
        return module.run(args)
    try:
        importlib.import_module("semask.utils.imports").import_modules(args.imports)
        return module.run(args)
    except (UserError, OSError) as error:  # OSError: a requested file cannot be written
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; all existing files are complete.", file=sys.stderr)
        return 130


def _summary(command: str) -> str:
    """The first line of a sub-command's help."""
    return (inspect.getdoc(COMMANDS[command]) or "").partition("\n")[0]
