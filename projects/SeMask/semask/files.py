"""Files that are either complete or not there."""

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Write ``path`` through a temporary file beside it, which takes its place at the end.

    If anything fails, ``path`` stays as it was and nothing is left behind. Missing folders are
    made.

    Args:
        path: a local file.

    Yields:
        The temporary file, opened for writing bytes.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
