"""Files that are either complete or absent."""

import contextlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from detectron2.utils.file_io import PathManager


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Write ``path`` through a temporary file beside it, which takes its place at the end.

    If anything fails, ``path`` stays as it was and nothing is left behind. Missing folders are
    made. Several processes, of several machines too, may write the same file at once.

    Args:
        path: a local file.

    Yields:
        The temporary file, opened for writing bytes.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read_json(path: str) -> Any:
    """What a JSON file holds.

    Args:
        path: a file, or a URL that Detectron2's ``PathManager`` fetches.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested too deeply.
    """
    with PathManager.open(path, "r", encoding="utf-8") as file:
        return parse_json(file.read())


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def remove_temporaries(folder: str) -> None:
    """Remove what processes that were killed in ``replacing`` have left in a folder.

    Args:
        folder: no process may be writing into it; its sub-folders stay as they are.
    """
    for name in os.listdir(folder):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))


def without_suffixes(names: Collection[Path], folders: Collection[Path] = ()) -> dict[Path, Path]:
    """Names of files without their suffixes, as far as they stay different.

    Args:
        names: relative paths, each different.
        folders: those names at which a folder will be made.

    Returns:
        {name: name without suffix}; the whole name where two would be equal, or where one
        would be a folder that contains another.
    """
    short = {name: name.with_suffix("") for name in names}
    while True:  # A whole name may be another's without suffix: "a.jpg" and "a.jpg.png".
        count = Counter(short.values())
        parents = {parent for value in short.values() for parent in value.parents}
        meeting = [
            name
            for name, value in short.items()
            if value != name and (count[value] > 1 or (name in folders and value in parents))
        ]
        if not meeting:
            return short
        short |= {name: name for name in meeting}
