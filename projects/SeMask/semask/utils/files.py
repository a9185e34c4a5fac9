"""Files that are either complete or not there."""

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from typing import BinaryIO


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


def remove_temporaries(folder: str) -> None:
    """Remove what processes that were killed in ``replacing`` have left in a folder.

    Args:
        folder: nobody is writing into it; the folders in it stay as they are.
    """
    for name in os.listdir(folder):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
