"""Atomic writing of checkpoint files, safe against a killed process and a loss of power."""

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
    """Write a file for ``read_checkpoint``; the existing file is kept until the new one is
    complete.

    Args:
        path: ".safetensors" writes only the entry "model"; any other suffix writes torch's format.
        content: tensors and plain values; other values could not be read again.

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
    """Like ``replacing``, but flushed to the disk on return, to survive a loss of power.

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
            f"Checkpoint '{path}' cannot be written ({one_line(failure)}). The existing file is "
            "unchanged."
        ) from error


def _unshared(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which the format does not support."""
    seen: set[int] = set()
    tensors = {}
    for name, value in parameters.items():
        memory = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if memory in seen else value.contiguous()
        seen.add(memory)
    return tensors


def _failure_of_the_file(error: BaseException) -> BaseException | None:
    """The OS error behind an error of torch's writer, which hides it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if cause is None and "Writer" in str(error):  # torch's own message for a failed write
        return error
    return cause


def _sync_folder(folder: str) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems do not support it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
