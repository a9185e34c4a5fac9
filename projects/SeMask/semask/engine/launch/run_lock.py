"""One run at a time in an output folder."""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator

from detectron2.utils import comm
from filelock import FileLock, Timeout

from semask.errors import ConfigError
from semask.utils.files import read_json, remove_temporaries

logger = logging.getLogger(__name__)

LOCK_FILE = ".run_lock"

# Folders that this process has locked.
_locked: set[str] = set()


@contextlib.contextmanager
def run_lock(folder: str, *, enabled: bool = True) -> Iterator[None]:
    """Lock the output folder for this run; called by all its processes together.

    The lock ends with its process; a data-loading process that outlives it does not hold it. A
    folder that this process has locked already is not locked again.
    The file stays. Files that killed runs have left half-written are
    removed.

    Args:
        folder: made if it is not there.
        enabled: False does nothing.

    Raises:
        ConfigError: another run has it, or it cannot be made or written to.
    """
    lock: FileLock | None = None
    refusal = ""
    path = os.path.realpath(folder)
    if enabled and path not in _locked and comm.is_main_process():
        try:
            lock = _acquire(folder)
            _locked.update([path] if lock else [])
        except ConfigError as error:
            refusal = str(error)
    refusals = [text for text in comm.all_gather(refusal) if text]
    try:
        if refusals:
            raise ConfigError(refusals[0])
        yield
    finally:
        if lock is not None:
            _locked.discard(path)
            lock.release()


def _acquire(folder: str) -> FileLock | None:
    """None where the file system has no locks."""
    path = os.path.join(folder, LOCK_FILE)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "ab"):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' cannot be made or written to: {error}."
        ) from error
    # Without fallback_to_soft: a lock that is only a file would outlive a killed run.
    lock = FileLock(path, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"Another run{_holder(path)} is writing to OUTPUT_DIR '{folder}'. Give this one "
            "another OUTPUT_DIR, or end the other one first. (OUTPUT_DIR_LOCK False starts it "
            "anyway; the two then overwrite each other's files.)"
        ) from error
    except OSError as error:
        logger.warning("'%s' cannot be locked (%s): is another run in there?", path, error)
        return None
    remove_temporaries(folder)
    return lock


def _write_holder(descriptor: int) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": started}
    os.truncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(holder).encode())


def _holder(path: str) -> str:
    """The holder of the lock, according to its file."""
    try:
        values = read_json(path)
        return f" (process {values['process']} on {values['host']}, since {values['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
