"""The set-up of a run: log, config file, random numbers, and whether it resumes."""

import argparse
import json
import logging
import os
import sys

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from semask.engine.launch.exit_status import is_expected
from semask.ops.apply import select_fast_paths
from semask.ops.malloc import keep_freed_memory
from semask.utils.device import Torchrun
from semask.utils.files import read_json, replacing
from semask.utils.precision import float32_precision

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


def set_up_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Start the log; for an evaluation also what ``Trainer`` does for a training.

    Detectron2's ``default_setup``, except that colours are for terminals alone, that arguments,
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
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.INFO)
                handler.addFilter(_is_for_console)
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
    """Write OUTPUT_DIR/config.yaml, for the main process alone."""
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

    Not the errors that ``exit_statuses`` tells, nor Detectron2's lines to copy into a spreadsheet.
    """
    if str(record.msg).startswith("copypaste") or str(record.msg).endswith("in csv format:"):
        return False
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not is_expected(error)


MARK = ".started"


def resumes(output_dir: str, *, asked: bool) -> bool:
    """Whether to resume; for all processes of a run together, holding its lock.

    torchrun repeats the same command after a failure. Without --resume it has to go on then from
    the checkpoints of this run, but not from those that an earlier run left in the folder.

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
