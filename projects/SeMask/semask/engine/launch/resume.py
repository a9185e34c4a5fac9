"""Whether a run goes on from a checkpoint when torchrun has started its processes anew.

torchrun repeats the same command after a failure. It has to go on from the checkpoints of this
run then, without --resume, but not from those that an earlier run left in the folder.
"""

import json
import os

from detectron2.utils import comm

from semask.utils.device import Torchrun
from semask.utils.files import replacing

MARK = ".started"


def resumes(output_dir: str, *, asked: bool) -> bool:
    """Whether to resume; for all processes of a run together, holding its lock.

    Args:
        output_dir: of the run; exists.
        asked: --resume was given.
    """
    torchrun = Torchrun.from_environment()
    if asked or torchrun is None:
        return asked
    resume = False
    if not comm.is_main_process():
        pass  # it is the main process that decides
    elif torchrun.restarts == 0:
        # Which checkpoint, if any, the run found when it was started.
        with replacing(os.path.join(output_dir, MARK)) as file:
            file.write(json.dumps(_last(output_dir)).encode())
    else:
        found = _last(output_dir)
        resume = found is not None and found != _mark(output_dir)
    return comm.all_gather(resume)[0]


def _last(output_dir: str) -> list[int] | None:
    """What tells one ``last_checkpoint`` from the next; None if there is none."""
    try:
        status = os.stat(os.path.join(output_dir, "last_checkpoint"))
    except FileNotFoundError:
        return None
    return [status.st_mtime_ns, status.st_ino]


def _mark(output_dir: str) -> list[int] | None:
    try:
        with open(os.path.join(output_dir, MARK), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None
