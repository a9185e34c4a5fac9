"""A loss that is not finite ends the run before it spoils the weights."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.utils import comm

from semask.utils.files import replacing

REPORT = "nonfinite_batch.json"


class NonFiniteLossError(FloatingPointError):
    """A loss became infinite or NaN; the message names the images of the batch."""


def refuse_nonfinite(
    losses: Sequence[Mapping[str, float]],
    files: Sequence[str],
    *,
    iteration: int,
    folder: str,
) -> None:
    """Raise if a loss of any process is not finite; for all processes together.

    Args:
        losses: of each process, by name; the same list in all of them.
        files: the images of this process in this step.
        iteration: number of the step.
        folder: where the main process writes the report; "" = nowhere.

    Raises:
        NonFiniteLossError: in all processes alike.
    """
    broken = [rank for rank, own in enumerate(losses) if not _finite(own)]
    if not broken:
        return
    all_files = comm.all_gather(list(files))
    report = [
        {
            "process": rank,
            "losses": {name: _text(value) for name, value in losses[rank].items()},
            "files": all_files[rank],
        }
        for rank in broken
    ]
    where = ""
    if folder:
        path = os.path.join(folder, REPORT)
        where = f" The batch is listed in '{path}'."
        if comm.is_main_process():
            with replacing(path) as file:
                text = json.dumps({"iteration": iteration, "batches": report}, indent=1)
                file.write(text.encode())
    names = [name for rank in broken for name in all_files[rank]]
    values = ", ".join(f"{name} = {_text(value)}" for name, value in losses[broken[0]].items())
    raise NonFiniteLossError(
        f"The loss is not finite at iteration {iteration} ({values}), for the images "
        f"{', '.join(names)}. The weights have not been updated.{where} Look at these images and "
        "labels, lower SOLVER.BASE_LR, or turn SOLVER.AMP off; --resume goes on from the last "
        "checkpoint."
    )


def _finite(losses: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in losses.values())


def _text(value: Any) -> str:
    """JSON has no NaN."""
    return str(value)
