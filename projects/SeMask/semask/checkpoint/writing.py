"""Writes checkpoint files that are complete or absent, also after a kill or a loss of power."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from semask.errors import UnwritableCheckpointError
from semask.utils.files import replacing
from semask.utils.text import one_line


def write_checkpoint(path: str, content: Mapping[str, Any]) -> None:
    """Write a file for ``read_checkpoint``; the former file stays until the new one is complete.

    Args:
        path: ends in ".safetensors", which takes the entry "model" alone, or else is in
            torch's format.
        content: tensors and plain values only, or they could not be read again.

    Raises:
        UnwritableCheckpointError: it cannot be written, for instance because the disk is full.
    """
    with written_durably(path) as file:
        if path.endswith(".safetensors"):
            from safetensors.torch import save

            file.write(save(_unshared(content["model"])))
        else:
            torch.save(dict(content), file)


@contextlib.contextmanager
def written_durably(path: str) -> Iterator[BinaryIO]:
    """Like ``replacing``, and on the disk when it returns, also after a loss of power.

    Raises:
        UnwritableCheckpointError: it cannot be written, for instance because the disk is full.
    """
    try:
        with replacing(path) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(os.path.dirname(os.path.abspath(path)))
    except (OSError, RuntimeError) as error:
        failure = _failure_of_the_file(error)
        if failure is None:
            raise
        raise UnwritableCheckpointError(
            f"Checkpoint '{path}' cannot be written ({one_line(failure)}). What was there before "
            "is untouched."
        ) from error


def _unshared(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory, which the format does not allow."""
    seen: set[int] = set()
    tensors = {}
    for name, value in parameters.items():
        memory = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if memory in seen else value.contiguous()
        seen.add(memory)
    return tensors


def _failure_of_the_file(error: BaseException) -> BaseException | None:
    """The file's error that caused one of torch's writer, which hides it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if cause is None and "Writer" in str(error):  # its own words for a failed write
        return error
    return cause


def _sync_folder(folder: str) -> None:
    """Flush a new name in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems do not support it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
