"""``semask COMMAND ...`` and ``python -m semask COMMAND ...``: parsing and dispatch.

Only the standard library is imported before the arguments have been read.
"""

import argparse
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Sequence

from semask.cli.arguments import COMMANDS
from semask.errors import ConfigError, UserError

# Module and function of each sub-command that is not `run` of the module of its name.
_FUNCTIONS = {
    "analyze": ("costs", "analyze"),
    "evaluate": ("train", "run"),
    "fit": ("costs", "fit"),
    "import": ("import_labels", "run"),
}
# Sub-commands that run a training or an evaluation; ``exit_statuses`` reports their errors.
_RUNS = ("train", "evaluate")

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be UTF-8; stderr has this handler already.
        sys.stdout.reconfigure(errors="backslashreplace")
    # It takes seconds; torchrun starts several processes, of which one says so.
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        name = prog or f"semask {command}"
        print(f"{name}: loading PyTorch and Detectron2 ...", file=sys.stderr, flush=True)
    importlib.import_module("semask.api")  # PyTorch, and Detectron2 as this project needs it
    module, function_name = _FUNCTIONS.get(command, (command, "run"))
    function = getattr(importlib.import_module(f"semask.cli.{module}"), function_name)
    if command in _RUNS:
        return function(args)
    try:
        import_modules(args.imports)
        return function(args)
    except (UserError, OSError) as error:  # OSError: a requested file cannot be written
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; all existing files are complete.", file=sys.stderr)
        return 130


def _summary(command: str) -> str:
    """The first line of a sub-command's help."""
    return (inspect.getdoc(COMMANDS[command]) or "").partition("\n")[0]


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


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, also from the current folder; errors inside them are not hidden.

    Args:
        names: as in an import statement, such as "my_project.decoder".

    Raises:
        ConfigError: there is no module of a name.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as for ``python -m``, but after installed packages
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists, but imports a missing one
            raise ConfigError(
                f"--import {name}: there is no module '{error.name}', neither installed nor in "
                f"'{os.getcwd()}'. Use the name of an import statement, without '.py'."
            ) from error
