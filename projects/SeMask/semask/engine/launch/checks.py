"""Checks of a run, before anything is built or written.

Each module checks its own arguments. These checks compare the config with the machine, the datasets
with the model, and the checkpoint with the model.
"""

import contextlib
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from semask.checkpoint import SeMaskCheckpointer, starts_partially
from semask.engine.launch.run_setup import refuse_overwriting
from semask.engine.trackers import check_trackers
from semask.errors import ConfigError, DamagedCheckpointError, UserError
from semask.modeling import check_protocol
from semask.modeling.build import build_model
from semask.solver import build_lr_scheduler, build_optimizer
from semask.tasks import build_task
from semask.utils.precision import check_precision, float32_precision
from semask.utils.text import one_line


def check_run(
    cfg: CfgNode,
    *,
    world_size: int = 1,
    eval_only: bool = False,
    resume: bool = False,
    restarted: bool = False,
    overwrite: bool = False,
) -> None:
    """Refuse a run that would fail later.

    Args:
        cfg: the whole config; ``MODEL.DEVICE`` has been resolved.
        world_size: number of processes of the run.
        eval_only: nothing is trained.
        resume: the checkpoint is the last one in ``OUTPUT_DIR``, if there is one.
        restarted: torchrun has restarted the processes after a failure.
        overwrite: checkpoints of an earlier run may be overwritten.

    Raises:
        ConfigError: keys that contradict each other, a dataset, or this machine.
        DataError: a dataset is missing or empty, or images of a sample of it cannot be used.
        CheckpointError: ``MODEL.WEIGHTS`` is missing, unsafe or of another model, or for an
            evaluation only a part of one.
    """
    _check_numbers(cfg)
    float32_precision(cfg)
    _check_output_dir(cfg.OUTPUT_DIR)
    if not (eval_only or resume or restarted or overwrite):
        refuse_overwriting(cfg.OUTPUT_DIR)
    if not eval_only:
        _check_solver(cfg, world_size)
        check_trackers(cfg)
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name at least one dataset to train on.")
    if eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name at least one dataset to evaluate on.")
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    task = build_task(cfg)
    task.check_datasets(names, eval_only=eval_only)
    _check_model(cfg, eval_only=eval_only, resume=resume)
    for name in dict.fromkeys(names):
        is_train = not eval_only and name in cfg.DATASETS.TRAIN
        task.check_images(name, is_train=is_train, resume=resume or restarted)


def _check_numbers(cfg: CfgNode) -> None:
    for key in ("SOLVER.MAX_ITER", "SOLVER.BASE_LR", "SOLVER.CHECKPOINT_PERIOD"):
        if not _value(cfg, key) > 0:
            raise ConfigError(f"{key} is {_value(cfg, key)}; it must be greater than 0.")
    for key in (
        *("SOLVER.WARMUP_ITERS", "SOLVER.WEIGHT_DECAY", "DATALOADER.NUM_WORKERS"),
        *("DATALOADER.MAX_UNREADABLE", "DATASETS.CHECK_SAMPLE"),
    ):
        if _value(cfg, key) < 0:
            raise ConfigError(f"{key} is {_value(cfg, key)}; it must be 0 or more.")
    if len(cfg.SOLVER.BETAS) != 2:
        raise ConfigError(f"SOLVER.BETAS is {cfg.SOLVER.BETAS}; it needs 2 numbers.")
    means, stds = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)
    if means != stds or not means:
        raise ConfigError(
            f"MODEL.PIXEL_MEAN has {means} numbers and MODEL.PIXEL_STD {stds}: set one value for "
            "each channel of the images in both, three for RGB."
        )


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _check_output_dir(folder: str) -> None:
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not (os.path.isdir(existing) and os.access(existing, os.W_OK)):
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' cannot be created or written to: check '{existing}'."
        )


def _check_solver(cfg: CfgNode, world_size: int) -> None:
    # With REFERENCE_WORLD_SIZE, Detectron2 scales the batch to the number of processes.
    sharing = cfg.SOLVER.REFERENCE_WORLD_SIZE or world_size
    images, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE_STEPS
    if parts < 1:
        raise ConfigError(f"SOLVER.ACCUMULATE_STEPS is {parts}; it must be at least 1.")
    if images < 1 or images % (sharing * parts):
        each = f" in {parts} accumulated batches each" if parts > 1 else ""
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {sharing} processes cannot share equally"
            f"{each}."
        )
    if cfg.SOLVER.EMA.ENABLED and not 0 <= cfg.SOLVER.EMA.DECAY < 1:
        raise ConfigError(f"SOLVER.EMA.DECAY is {cfg.SOLVER.EMA.DECAY}; it must be in [0, 1).")
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN is '{cfg.DATALOADER.SAMPLER_TRAIN}'; only 'TrainingSampler' "
            "is supported, which shuffles the images of each epoch."
        )
    check_precision(cfg)


def _check_model(cfg: CfgNode, *, eval_only: bool, resume: bool) -> None:
    """Build the model on the meta device, and check solver and checkpoint with it."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            model = build_model(cfg)
    except NotImplementedError:  # a module that needs values while it is built
        model = build_model(cfg)
    check_protocol(cfg, model)
    if not eval_only:
        _check_optimizer(cfg, model)
    checkpointer = SeMaskCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        allow_pickle=cfg.MODEL.ALLOW_PICKLE,
        complete=eval_only,
        partial=starts_partially(cfg),
    )
    if resume and checkpointer.has_checkpoint():
        with contextlib.suppress(DamagedCheckpointError):  # the run then uses the previous one
            checkpointer.check(checkpointer.get_checkpoint_file(), strict=True)
        return
    if eval_only and not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "--eval-only has no weights to evaluate: set MODEL.WEIGHTS to a checkpoint, or add "
            f"--resume to use the last one in OUTPUT_DIR '{cfg.OUTPUT_DIR}'."
        )
    checkpointer.check(cfg.MODEL.WEIGHTS)


def _check_optimizer(cfg: CfgNode, model: nn.Module) -> None:
    try:
        build_lr_scheduler(cfg, build_optimizer(cfg, model))
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, RuntimeError, ArithmeticError) as error:
        reason = one_line(error).rstrip(".")  # PyTorch's words
        raise ConfigError(f"SOLVER: no optimizer or schedule can be built: {reason}.") from error
