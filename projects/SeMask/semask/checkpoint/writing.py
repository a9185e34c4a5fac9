"""Checkpoint files that are complete or not there, also after a kill or a loss of power."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch

from semask.files import replacing

from .errors import CheckpointError
from .reading import one_line


def write_checkpoint(path: str, content: Mapping[str, Any]) -> None:
    """Write a file for ``read_checkpoint``; the former file stays until the new one is complete.

    Args:
        path: ends in ".safetensors", which takes the entry "model" alone, or else is in
            torch's format.
        content: tensors and plain values only, or they could not be read again.

    Raises:
        CheckpointError: it cannot be written, for instance because the disk is full.
    """
    try:
        with written_durably(path) as file:
            if path.endswith(".safetensors"):
                from safetensors.torch import save

                tensors = {name: value.contiguous() for name, value in content["model"].items()}
                file.write(save(tensors))
            else:
                torch.save(dict(content), file)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Writer" not in str(error):
            raise  # torch's writer reports some failures of the file as its own
        raise CheckpointError(
            f"Checkpoint '{path}' cannot be written ({one_line(error)}). What was there before is "
            "untouched: make room or choose another OUTPUT_DIR, and --resume goes on from the "
            "last checkpoint."
        ) from error


@contextlib.contextmanager
def written_durably(path: str) -> Iterator[BinaryIO]:
    """Like ``replacing``, and on the disk when it returns, also after a loss of power."""
    with replacing(path) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no such thing
            os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)
