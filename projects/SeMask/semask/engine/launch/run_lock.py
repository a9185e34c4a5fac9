"""One run at a time in an output folder."""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import IO

from detectron2.utils import comm

from semask.errors import ConfigError
from semask.utils.files import remove_temporaries

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = ".run_lock"


@contextlib.contextmanager
def run_lock(folder: str, *, enabled: bool = True) -> Iterator[None]:
    """Hold the output folder for this run; for all its processes together.

    The lock ends with the process that has it, however that ends. Its file stays. Files that
    killed runs have left half-written are removed.

    Args:
        folder: made if it is not there.
        enabled: False does nothing.

    Raises:
        ConfigError: another run has it, or it cannot be made or written to.
    """
    file: IO[str] | None = None
    refusal = ""
    if enabled and comm.is_main_process():
        try:
            file = _lock(folder)
        except ConfigError as error:
            refusal = str(error)
    refusals = [text for text in comm.all_gather(refusal) if text]
    if refusals:
        raise ConfigError(refusals[0])
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _lock(folder: str) -> IO[str] | None:
    path = os.path.join(folder, LOCK_FILE)
    try:
        os.makedirs(folder, exist_ok=True)
        if fcntl is None:
            return None
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (closing it ends the lock)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' cannot be made or written to: {error}."
        ) from error
    try:
        # Of this process alone: data loading processes that outlive it do not have it, too.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = _holder(file)
        file.close()
        raise ConfigError(
            f"Another run{holder} is writing to OUTPUT_DIR '{folder}'. Give this one another "
            "OUTPUT_DIR, or end the other one first. (OUTPUT_DIR_LOCK False starts it anyway; the "
            "two then overwrite each other's files.)"
        ) from error
    except OSError as error:
        logger.warning("'%s' cannot be locked (%s): is another run in there?", path, error)
    else:
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": started}, file)
        file.flush()
        remove_temporaries(folder)
    return file


def _holder(file: IO[str]) -> str:
    """Who has the lock, as far as its file tells."""
    file.seek(0)
    try:
        values = json.load(file)
        return f" (process {values['process']} on {values['host']}, since {values['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
