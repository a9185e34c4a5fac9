"""The end of a run that cannot continue: one message on stderr and an exit status."""

import contextlib
import errno
import sys
from collections.abc import Iterator

import torch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from semask.data.training_loader import is_lost_loader
from semask.engine.launch.distributed import LOST_PEER, is_lost_peer
from semask.engine.train_step import NonFiniteLossError
from semask.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingCheckpointError,
    OutOfMemoryError,
    UnwritableCheckpointError,
)
from semask.utils.text import one_line

USER_ERRORS = (ConfigError, DataError, CheckpointError)

MAKE_ROOM = "Make room for OUTPUT_DIR; --resume goes on from the last checkpoint, if there is one."
LOST_LOADER = (
    "A data loading process has been killed, most often because the machine has too little "
    "memory: lower DATALOADER.NUM_WORKERS or SOLVER.IMS_PER_BATCH. --resume goes on from the last "
    "checkpoint."
)
# What to do where the message of an error, which other programs give too, does not say it.
ADVICE: dict[type[Exception], str] = {
    MissingCheckpointError: (
        " Correct MODEL.WEIGHTS, or with --resume the file 'last_checkpoint' in OUTPUT_DIR."
    ),
    UnwritableCheckpointError: f" {MAKE_ROOM}",
}


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """Turn errors that a user can fix into a message.

    Raises:
        SystemExit: with 2 for a mistake in config, data or checkpoint and for a full disk, 1 for a
            loss that is not finite, a device with too little memory, or another process that is
            gone (of the run, or one that loads data), 130 after Ctrl-C. Other errors stay as they
            are.
    """
    try:
        yield
    except USER_ERRORS as error:
        _report(error)
        raise SystemExit(2) from None
    except (NonFiniteLossError, OutOfMemoryError) as error:
        _report(error)
        raise SystemExit(1) from None
    except ProcessExitedException as error:  # of ``launch``; the process has said why
        print(error, file=sys.stderr)
        raise SystemExit(max(1, error.exit_code)) from None
    except (OSError, RuntimeError) as error:
        if _is_full_disk(error):
            print(f"The disk is full: {one_line(error)}. {MAKE_ROOM}", file=sys.stderr)
            raise SystemExit(2) from None
        if is_lost_loader(error):
            print(f"{LOST_LOADER} ({one_line(error)})", file=sys.stderr)
            raise SystemExit(1) from None
        if not is_lost_peer(error):
            raise
        print(f"{LOST_PEER} ({one_line(error)})", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(
            "Interrupted; --resume goes on from the last checkpoint, if there is one.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def is_expected(error: BaseException) -> bool:
    """Whether ``exit_statuses`` has a message for an error, so its traceback is not needed."""
    known = (*USER_ERRORS, NonFiniteLossError, OutOfMemoryError, ProcessExitedException)
    return (
        isinstance(error, known)
        or _is_full_disk(error)
        or is_lost_peer(error)
        or is_lost_loader(error)
        or is_out_of_memory(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error comes from PyTorch's allocator of the GPU or the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )


def _is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _report(error: Exception) -> None:
    advice = ADVICE.get(type(error), "")
    where = f"Process {comm.get_rank()}: " if comm.get_world_size() > 1 else ""
    print(f"{where}{type(error).__name__}: {_message(error)}{advice}", file=sys.stderr)


def _message(error: Exception) -> str:
    """The error's message, without the traceback that a data loading process puts around it."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return text
