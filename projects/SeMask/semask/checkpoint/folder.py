"""The checkpoints in a folder, and their order."""

import math
import os
import re

from semask.checkpoint.reading import read_checkpoint
from semask.errors import CheckpointError, DamagedCheckpointError

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
