"""The output folder of an import, which gets the data at the end, all at once."""

import contextlib
import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from semask.errors import ConfigError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

PALETTE_FILE = "palette.csv"


def check_empty(target: Path) -> None:
    """Check that the output has at most ``PALETTE_FILE``; what killed imports left is removed.

    Raises:
        ConfigError: it has other files, or is one.
    """
    if target.is_dir():
        _remove_leftovers(target, target.name)
        if found := set(os.listdir(target)) - {PALETTE_FILE}:
            raise _not_empty(target, found)
    elif target.exists():
        raise _not_empty(target)


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A folder of this import alone, on the file system of the output; removed at the end."""
    exists = target.is_dir()
    # Of a dangling link, the place that it names. A mount point has its own file system.
    parent = target if exists else Path(os.path.realpath(target)).parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent, target.name)
    own = tempfile.mkdtemp(dir=parent, prefix=f".{target.name}.", suffix=".partial")
    with _locked(Path(own)):
        try:
            yield Path(own, "data")  # mkdtemp's folder is only for this user
        finally:
            shutil.rmtree(own, ignore_errors=True)


def take_place(finished: Path, target: Path) -> None:
    """Move the data of a partial folder to the output, which may be a link, or a mount point.

    Raises:
        ConfigError: meanwhile, something else has been written there.
    """
    if not target.is_dir():
        try:
            os.rename(finished, os.path.realpath(target))
        except OSError as error:
            if not os.path.exists(target):
                raise
            raise _not_empty(target) from error
        return
    if found := set(os.listdir(target)) - {PALETTE_FILE, finished.parent.name}:
        raise _not_empty(target, found)
    for entry in sorted(os.listdir(finished)):
        os.rename(finished / entry, target / entry)


def _remove_leftovers(parent: Path, name: str) -> None:
    """Remove the partial folders that killed imports to an output of this name have left."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}\.partial")
    for entry in os.listdir(parent):
        if pattern.fullmatch(entry):
            with _locked(parent / entry) as locked:
                if locked:
                    shutil.rmtree(parent / entry, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a partial folder until the end of the block, or of this process.

    Yields:
        Whether it is locked: not if an import uses it, or if its file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        locked = False
        if fcntl is not None:
            with contextlib.suppress(OSError):
                number = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, number)
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
        yield locked


def _not_empty(target: Path, found: Collection[str] = ()) -> ConfigError:
    example = f" ('{min(found)}')" if found else ""
    return ConfigError(
        f"The output '{target}' exists and is not empty{example}: use another folder, or remove it."
    )
