"""The set-up of a run: its output folder, log, config file, random numbers, and whether it resumes.

There is one run at a time in an output folder, and none overwrites an earlier one's checkpoints.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from filelock import FileLock, Timeout

from semask.checkpoint import written_checkpoints
from semask.engine.launch.ending import is_expected
from semask.errors import ConfigError
from semask.ops.apply import select_fast_paths
from semask.ops.malloc import keep_freed_memory
from semask.utils.device import Torchrun
from semask.utils.files import read_json, remove_temporaries, replacing
from semask.utils.precision import float32_precision

logger = logging.getLogger(__name__)

LOCK_FILE, CONFIG_FILE, MARK = ".run_lock", "config.yaml", ".started"

# Folders that this process has locked.
_locked: set[str] = set()


@contextlib.contextmanager
def run_lock(folder: str, *, enabled: bool = True) -> Iterator[None]:
    """Lock the output folder for this run; called by all its processes together.

    The lock ends with its process; a data-loading process that outlives it does not hold it. A
    folder that this process has locked already is not locked again. The lock's file is not
    removed. Half-written files of killed runs are removed.

    Args:
        folder: created if it does not exist.
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
    """The acquired lock; None if the file system has no locks."""
    path = os.path.join(folder, LOCK_FILE)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "ab"):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' cannot be created or written to: {error}."
        ) from error
    # Without fallback_to_soft: a lock that is only a file would outlive a killed run.
    lock = FileLock(path, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"Another run{_holder(path)} is writing to OUTPUT_DIR '{folder}'. Use another "
            "OUTPUT_DIR for this one, or end the other one first. (OUTPUT_DIR_LOCK False starts "
            "it anyway; the two then overwrite each other's files.)"
        ) from error
    except OSError as error:
        logger.warning("'%s' cannot be locked (%s): check that no other run uses it", path, error)
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


def refuse_overwriting(folder: str) -> None:
    """Refuse to start a run in a folder with checkpoints of an earlier run.

    Args:
        folder: OUTPUT_DIR; need not exist.

    Raises:
        ConfigError: there are some.
    """
    names = written_checkpoints(folder)
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' has the checkpoints of an earlier run "
            f"({', '.join(names[:4])}{more}). Add --resume to continue from the last one, use "
            "another OUTPUT_DIR, or add --overwrite to remove them and start over (in Python, "
            "arguments of resume_or_load)."
        )


def remove_checkpoints(folder: str) -> None:
    """Remove the checkpoints of an earlier run, so that they are not taken for this run's.

    Args:
        folder: OUTPUT_DIR; the other files in it stay.
    """
    names = written_checkpoints(folder)
    for name in names:
        os.unlink(os.path.join(folder, name))
    if names:
        logger.info("Removed from '%s' (--overwrite): %s", folder, ", ".join(names))


def set_up_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Start the log; for an evaluation also what ``Trainer`` does for a training.

    Detectron2's ``default_setup``, except that colours are only for terminals, that arguments,
    environment and config go to the log file but not to the console, that the console shows no
    traceback of what ``exit_statuses`` says in a sentence, and that an evaluation leaves the config
    of the training in its folder as it is.

    Args:
        cfg: of the run; its OUTPUT_DIR is there.
        args: the command line.
    """
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "semask"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name, color=sys.stdout.isatty())
        for handler in logging.getLogger(name).handlers:
            stream = getattr(handler, "stream", None)
            if stream is sys.stdout:
                handler.setLevel(logging.INFO)
                handler.addFilter(_is_for_console)
            elif isinstance(stream, io.TextIOWrapper):  # the log file, with any file name
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    level = logging.INFO if comm.get_world_size() > 1 else logging.DEBUG
    logger.log(level, "Process %d of %d", rank, comm.get_world_size())
    logger.debug("Command line arguments: %s", args)
    logger.debug("Environment:\n%s", collect_env_info())
    logger.debug("Config:\n%s", cfg.dump())
    if cfg.SEED < 0:  # otherwise the same weights in every process that PyTorch starts in
        seed_all_rng(None)
    if args.eval_only:
        if not os.path.exists(os.path.join(cfg.OUTPUT_DIR, CONFIG_FILE)):
            write_config(cfg)
        prepare_process(cfg)


def prepare_process(cfg: CfgNode) -> None:
    """Set the allocator, float32's precision and, with a ``SEED``, the random numbers."""
    if "kept_memory" in select_fast_paths(cfg):
        keep_freed_memory()
    precision = float32_precision(cfg)
    if precision:
        torch.set_float32_matmul_precision(precision)
    if cfg.SEED >= 0:
        seed_all_rng(cfg.SEED + comm.get_rank())


def write_config(cfg: CfgNode) -> None:
    """Write OUTPUT_DIR/config.yaml, only in the main process."""
    if comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, CONFIG_FILE)
        with replacing(path) as file:
            file.write(cfg.dump().encode())
        logger.info("The full config is in %s", path)


def log_to_console() -> None:
    """Log to the console unless the program has configured logging.

    As Detectron2's ``DefaultTrainer`` does, for this project's log, too.
    """
    for name in ("detectron2", "semask"):
        if not logging.getLogger(name).isEnabledFor(logging.INFO):
            setup_logger(distributed_rank=comm.get_rank(), name=name, color=sys.stdout.isatty())


def _is_for_console(record: logging.LogRecord) -> bool:
    """Whether a log record is shown on the console.

    Errors that ``exit_statuses`` reports are not shown, nor Detectron2's lines that are meant for
    spreadsheets or describe how it stores the list of images.
    """
    message = str(record.msg)
    if message.startswith(("copypaste", "Serializ")) or message.endswith("in csv format:"):
        return False
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not is_expected(error)


def resumes(output_dir: str, *, asked: bool) -> bool:
    """Whether to resume; for all processes of a run together, holding its lock.

    torchrun repeats the same command after a failure. Even without --resume it must then continue
    from the checkpoints of this run, but not from those of an earlier run in the folder.

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
    """An identifier of the present ``last_checkpoint``; None if there is none."""
    try:
        status = os.stat(os.path.join(output_dir, "last_checkpoint"))
    except FileNotFoundError:
        return None
    return [status.st_mtime_ns, status.st_ino]


def _mark(output_dir: str) -> list[int] | None:
    try:
        return read_json(os.path.join(output_dir, MARK))
    except (OSError, ValueError):
        return None
