"""The checkpoints in a folder, and their order."""

import math
import os
import re

from semask.checkpoint.reading import read_checkpoint
from semask.errors import CheckpointError, DamagedCheckpointError

LAST = "last_checkpoint"

# Detectron2's names, and those of the best weights.
_WRITTEN = re.compile(r"model_(\d+|final|best|best_ema)\.pth")


def written_checkpoints(folder: str) -> list[str]:
    """All files in a folder that a new run would overwrite or mix with its own, by name."""
    if not os.path.isdir(folder):
        return []
    return sorted(n for n in os.listdir(folder) if n == LAST or _WRITTEN.fullmatch(n))


def has_checkpoint(folder: str) -> bool:
    """Whether a folder has a checkpoint to resume from."""
    return os.path.exists(os.path.join(folder, LAST)) or bool(resumable_checkpoints(folder))


def resumable_checkpoints(folder: str, before: str = "") -> list[str]:
    """The files in a folder that a run can resume from, the highest iteration first.

    Modification times are not used: a copy or a backup does not keep them.

    Args:
        folder: of the run.
        before: name of one of them; it and those of later iterations are left out.
    """
    names = [n for n in written_checkpoints(folder) if n != LAST and "best" not in n]
    limit = _iteration(folder, before) if before else math.inf
    iterations = {name: _iteration(folder, name) for name in names if name != before}
    usable = [name for name, iteration in iterations.items() if iteration <= limit]
    return sorted(usable, key=lambda name: (iterations[name], name), reverse=True)


def read_last(folder: str) -> str:
    """The name in ``last_checkpoint``.

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
            f"'{path}' does not hold the name of a checkpoint. Write the name of a file in that "
            "folder into it, such as model_final.pth."
        )
    return name


def _iteration(folder: str, name: str) -> float:
    """The iteration after which a checkpoint was written; infinite where that is not known."""
    number = re.search(r"\d+", name)
    if number:
        return int(number.group())
    try:
        iteration = read_checkpoint(os.path.join(folder, name)).get("iteration")
    except CheckpointError:
        return math.inf
    return iteration if isinstance(iteration, int) else math.inf
