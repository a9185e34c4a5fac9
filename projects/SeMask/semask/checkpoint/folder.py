"""The checkpoints in a folder: their order, and atomic writing.

Writing is safe against a killed process and a loss of power.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from semask.checkpoint.reading import read_checkpoint
from semask.errors import CheckpointError, DamagedCheckpointError, UnwritableCheckpointError
from semask.utils.files import replacing
from semask.utils.text import one_line

LAST = "last_checkpoint"

# Detectron2's file names, and those of the best weights.
_WRITTEN = re.compile(r"model_(\d+|final|best|best_ema)\.pth")


def written_checkpoints(folder: str) -> list[str]:
    """The names of all checkpoint files in a folder that a new run would overwrite or mix with its
    own.
    """
    if not os.path.isdir(folder):
        return []
    return sorted(n for n in os.listdir(folder) if n == LAST or _WRITTEN.fullmatch(n))


def has_checkpoint(folder: str) -> bool:
    """Whether a folder has a checkpoint to resume from."""
    return os.path.exists(os.path.join(folder, LAST)) or bool(resumable_checkpoints(folder))


def resumable_checkpoints(folder: str, before: str = "") -> list[str]:
    """The files in a folder that a run can resume from, highest iteration first.

    Modification times are not used: a copy or a backup does not keep them.

    Args:
        folder: the run's output folder.
        before: name of one of them; it and those of later iterations are excluded.
    """
    names = [n for n in written_checkpoints(folder) if n != LAST and "best" not in n]
    limit = _iteration(folder, before) if before else math.inf
    iterations = {name: _iteration(folder, name) for name in names if name != before}
    usable = [name for name, iteration in iterations.items() if iteration <= limit]
    return sorted(usable, key=lambda name: (iterations[name], name), reverse=True)


def read_last(folder: str) -> str:
    """The file name in ``last_checkpoint``.

    Raises:
        DamagedCheckpointError: the file is missing, or holds no name.
    """
    path = os.path.join(folder, LAST)
    try:
        with open(path, "rb") as file:
            name = file.read(4096).decode().strip()
    except UnicodeDecodeError:
        name = ""
    except OSError as error:
        raise DamagedCheckpointError(f"'{path}' cannot be read ({error.strerror}).") from error
    if not name or not name.isprintable():
        raise DamagedCheckpointError(
            f"'{path}' does not contain the name of a checkpoint. Write the name of a file in that "
            "folder into it, such as model_final.pth."
        )
    return name


def _iteration(folder: str, name: str) -> float:
    """The iteration after which a checkpoint was written; infinite if unknown."""
    number = re.search(r"\d+", name)
    if number:
        return int(number.group())
    try:
        iteration = read_checkpoint(os.path.join(folder, name)).get("iteration")
    except CheckpointError:
        return math.inf
    return iteration if isinstance(iteration, int) else math.inf


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
