"""Atomic writing of files, reading of JSON, and the files below a folder."""

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

from semask.errors import DataError

# The second form is that of version 0.1.
_TEMPORARY = re.compile(r"\.([0-9a-f]{32}|.+\.[0-9a-f]{8})\.tmp")
# Folders that operating systems create on disks and in archives.
_SYSTEM_FOLDERS = ("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Write ``path`` atomically, through a temporary file in the same folder.

    If anything fails, ``path`` is unchanged and the temporary file is removed. Missing folders are
    created. Several processes, also on several machines, may write the same file at once.

    Args:
        path: a local file.

    Yields:
        The temporary file, opened for writing bytes.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    # Without the file's name, which may have the maximum length already.
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(path: str, text: str) -> None:
    r"""Write a text as UTF-8, atomically, as :func:`replacing` does.

    Bytes of file names that are not UTF-8, which Python keeps as lone surrogates, are written as
    ``\udce9``; JSON reads this back as the same name.

    Args:
        path: a local file.
        text: its content.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def read_json(path: str) -> Any:
    """Read a JSON file in UTF-8, with or without a byte order mark, which editors on Windows add.

    Args:
        path: a file, or a URL supported by Detectron2's ``PathManager``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or nested too deeply.
    """
    with PathManager.open(path, "r", encoding="utf-8-sig") as file:
        return parse_json(file.read())


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def files_below(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """All files in a folder and its subfolders, each folder's by name, before its subfolders'.

    Hidden files and folders, and those that operating systems create, are left out. Links to
    folders are followed, except to a folder that contains the link.

    Args:
        folder: an existing one.

    Raises:
        DataError: a folder cannot be read.
    """
    yield from _files_below(Path(folder), (os.path.realpath(folder),))


def _files_below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """The same; ``above`` are the real paths of the folder and of those that led to it."""
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"The folder '{folder}' cannot be read: {error.strerror}.",
            "Give this user the permission to read it, or use a folder without it.",
        ) from error
    subfolders = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not _is_folder(entry):
            yield folder / entry.name
        elif entry.name not in _SYSTEM_FOLDERS:
            subfolders.append(folder / entry.name)
    for subfolder in subfolders:
        real = os.path.realpath(subfolder)
        if not any(place == real or place.startswith(real + os.sep) for place in above):
            yield from _files_below(subfolder, (*above, real))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: whoever opens it says so
        return False


def remove_temporaries(folder: str) -> None:
    """Remove temporary files that processes killed in ``replacing`` have left in a folder.

    Args:
        folder: no process may be writing into it; subfolders are not searched.
    """
    for name in os.listdir(folder):
        if _TEMPORARY.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))


def without_suffixes(names: Collection[Path], folders: Collection[Path] = ()) -> dict[Path, Path]:
    """Names of files without their suffixes, if they stay unique.

    Args:
        names: relative paths, all different.
        folders: names at which a folder will be created.

    Returns:
        {name: name without suffix}; the full name if two would be equal, or if one would be a
        folder that contains another.
    """
    short = {name: name.with_suffix("") for name in names}
    while True:  # A full name may be another's without suffix: "a.jpg" and "a.jpg.png".
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
