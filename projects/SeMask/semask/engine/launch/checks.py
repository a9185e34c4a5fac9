"""What can be wrong with a run, found before anything is built for long or written.

The parts check their own arguments; here is what crosses them: config against machine, datasets
against model, checkpoint against model.
"""

import contextlib
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from semask.checkpoint import SeMaskCheckpointer
from semask.data.checks.semantic import quick_check, registered_metadata
from semask.data.loading.unreadable import ReadableDataset
from semask.data.mappers.semantic import SemSegMapper
from semask.engine.launch.distributed import Torchrun
from semask.engine.launch.instance_checks import (
    check_best_metric,
    check_instance_metadata,
    check_instances,
    check_same_categories,
)
from semask.engine.precision import check_precision
from semask.errors import ConfigError, DamagedCheckpointError
from semask.modeling import check_protocol
from semask.solver import build_lr_scheduler, build_optimizer


def resolve_device(
    cfg: CfgNode, num_gpus: int, *, explicit: bool, torchrun: Torchrun | None = None
) -> None:
    """Let ``MODEL.DEVICE`` fall back to "cpu" where there is no GPU, and refuse what cannot work.

    Args:
        cfg: not frozen; ``MODEL.DEVICE`` is changed in place.
        num_gpus: GPUs asked for on this machine; 0 means the CPU.
        explicit: the user has asked for this very device, so it does not fall back.
        torchrun: what has started this process, if it has; it then decides on the processes.

    Raises:
        ConfigError: the device or so many GPUs do not exist, or the two do not go together.
    """
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE '{cfg.MODEL.DEVICE}' is no device of PyTorch.") from error
    found = torch.cuda.device_count()
    if num_gpus < 0:
        raise ConfigError(f"--num-gpus is {num_gpus}; it cannot be negative.")
    if torchrun is not None:
        _check_torchrun(cfg, torchrun, num_gpus, found, explicit)
        return
    if num_gpus > 1 and device.type == "cpu":
        raise ConfigError(
            f"--num-gpus {num_gpus} starts processes on GPUs, but MODEL.DEVICE is 'cpu'. To train "
            f"in {num_gpus} processes on the CPU, start them with torchrun: torchrun "
            f"--nproc-per-node {num_gpus} train_net.py ..., without --num-gpus."
        )
    if num_gpus > max(1, found):
        raise ConfigError(f"--num-gpus is {num_gpus}, but this machine has {found} CUDA device(s).")
    if device.type == "cuda" and not explicit and (num_gpus == 0 or found == 0):
        cfg.MODEL.DEVICE = "cpu"
    elif device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(
            f"MODEL.DEVICE is '{device}', but PyTorch finds {found} CUDA device(s). Leave "
            "MODEL.DEVICE out to run on the CPU where there is no GPU."
        )
    if num_gpus > 1 and (device.type != "cuda" or device.index is not None):
        raise ConfigError(
            f"--num-gpus {num_gpus} gives each process a GPU of its own, but MODEL.DEVICE is "
            f"'{device}'; it has to be 'cuda'."
        )


def _check_torchrun(
    cfg: CfgNode, torchrun: Torchrun, num_gpus: int, found: int, explicit: bool
) -> None:
    """As ``resolve_device``, for a process that torchrun has started."""
    processes = torchrun.local_world_size
    device = torch.device(cfg.MODEL.DEVICE)
    if num_gpus > 1:
        raise ConfigError(
            "torchrun has started the processes already: leave --num-gpus, --num-machines, "
            "--machine-rank and --dist-url out."
        )
    if device.type != "cuda":
        return
    if not explicit and (num_gpus == 0 or found == 0):
        cfg.MODEL.DEVICE = "cpu"
    elif device.index is not None and processes > 1:
        raise ConfigError(
            f"torchrun gives each of its {processes} processes a GPU of its own, but MODEL.DEVICE "
            f"is '{device}'; it has to be 'cuda'."
        )
    elif processes > found:
        raise ConfigError(
            f"torchrun has started {processes} processes on this machine, which has {found} CUDA "
            f"device(s): use --nproc-per-node {max(1, found)}, or MODEL.DEVICE cpu."
        )


def check_run(
    cfg: CfgNode,
    *,
    world_size: int = 1,
    eval_only: bool = False,
    resume: bool = False,
    restarted: bool = False,
) -> None:
    """Refuse a run that would fail later.

    Args:
        cfg: the whole config; ``MODEL.DEVICE`` has been resolved.
        world_size: number of processes of the run.
        eval_only: nothing is trained.
        resume: the checkpoint is the last one in ``OUTPUT_DIR``, if there is one.
        restarted: torchrun has started the processes anew, after a failure.

    Raises:
        ConfigError: keys that contradict each other, a dataset, or this machine.
        DataError: a dataset is missing or empty, or images of a sample of it cannot be used.
        CheckpointError: ``MODEL.WEIGHTS`` is missing, unsafe or of another model, or for an
            evaluation only a part of one.
    """
    _check_numbers(cfg)
    _check_output_dir(cfg.OUTPUT_DIR)
    if not eval_only:
        _check_solver(cfg, world_size)
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name at least one dataset to train on.")
    if eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name at least one dataset to evaluate on.")
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    if cfg.INPUT.MAPPER == "instances":
        check_same_categories(names)
        if not eval_only:
            check_best_metric(cfg)
    for name in names:
        check_metadata(cfg, name)
    _check_model(cfg, eval_only=eval_only, resume=resume)
    for name in dict.fromkeys(names):
        is_train = not eval_only and name in cfg.DATASETS.TRAIN
        check_images(cfg, name, is_train=is_train, resume=resume or restarted)


def _check_numbers(cfg: CfgNode) -> None:
    for key in ("SOLVER.MAX_ITER", "SOLVER.BASE_LR", "SOLVER.CHECKPOINT_PERIOD"):
        if not _value(cfg, key) > 0:
            raise ConfigError(f"{key} is {_value(cfg, key)}; it has to be greater than 0.")
    for key in (
        *("SOLVER.WARMUP_ITERS", "SOLVER.WEIGHT_DECAY", "DATALOADER.NUM_WORKERS"),
        *("DATALOADER.MAX_UNREADABLE", "DATASETS.CHECK_SAMPLE"),
    ):
        if _value(cfg, key) < 0:
            raise ConfigError(f"{key} is {_value(cfg, key)}; it has to be 0 or more.")
    for key, count in (("SOLVER.BETAS", 2), ("MODEL.PIXEL_MEAN", 3), ("MODEL.PIXEL_STD", 3)):
        if len(_value(cfg, key)) != count:
            raise ConfigError(f"{key} is {_value(cfg, key)}; it needs {count} numbers.")


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _check_output_dir(folder: str) -> None:
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not (os.path.isdir(existing) and os.access(existing, os.W_OK)):
        raise ConfigError(f"OUTPUT_DIR '{folder}' cannot be made or written to: see '{existing}'.")


def _check_solver(cfg: CfgNode, world_size: int) -> None:
    sharing = cfg.SOLVER.REFERENCE_WORLD_SIZE or world_size  # with the former, batches are scaled
    images, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE_STEPS
    if parts < 1:
        raise ConfigError(f"SOLVER.ACCUMULATE_STEPS is {parts}; it has to be at least 1.")
    if images < 1 or images % (sharing * parts):
        each = f" in {parts} accumulated batches each" if parts > 1 else ""
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {sharing} processes cannot share equally"
            f"{each}."
        )
    if cfg.SOLVER.EMA.ENABLED and not 0 <= cfg.SOLVER.EMA.DECAY < 1:
        raise ConfigError(f"SOLVER.EMA.DECAY is {cfg.SOLVER.EMA.DECAY}; it has to be in [0, 1).")
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN is '{cfg.DATALOADER.SAMPLER_TRAIN}'; training here only "
            "knows 'TrainingSampler', which shuffles the images of each pass."
        )
    check_precision(cfg)


def check_metadata(cfg: CfgNode, name: str) -> None:
    """Hold a dataset's name, classes and ignore value against the config.

    Raises:
        ConfigError: the dataset is not registered, or it has other classes than the model.
    """
    if cfg.INPUT.MAPPER == "instances":
        check_instance_metadata(cfg, name)
        return
    head = cfg.MODEL.SEM_SEG_HEAD
    metadata = registered_metadata(name)
    classes = metadata.get("stuff_classes", None)
    if not classes:
        raise ConfigError(f"Dataset '{name}' has no class names: its metadata need stuff_classes.")
    in_backbone = cfg.MODEL.SEMASK.NUM_CLASSES or head.NUM_CLASSES
    if not len(classes) == head.NUM_CLASSES == in_backbone:
        raise ConfigError(
            f"The numbers of classes disagree: dataset '{name}' has {len(classes)}, "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES} and MODEL.SEMASK.NUM_CLASSES "
            f"is {cfg.MODEL.SEMASK.NUM_CLASSES} (0 = as the head). Set the head's to "
            f"{len(classes)} and leave the other at 0."
        )
    ignore_value = metadata.get("ignore_label", head.IGNORE_VALUE)
    if ignore_value != head.IGNORE_VALUE:
        raise ConfigError(
            f"Dataset '{name}' ignores the label {ignore_value}, but "
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE}: they have to be the same."
        )


def check_images(cfg: CfgNode, name: str, *, is_train: bool, resume: bool = False) -> None:
    """List a dataset (which may generate it), look at a sample of its images and label maps, and
    take its first image through the pipeline.

    Args:
        cfg: the whole config.
        name: a registered dataset.
        is_train: it is trained on.
        resume: unreadable files do not keep a run from going on; it will skip them.

    Raises:
        DataError: it is missing or empty, or images or label maps cannot be used.
        ConfigError: the input pipeline cannot be built from the config.
    """
    if cfg.INPUT.MAPPER == "instances":
        check_instances(cfg, name, is_train=is_train, resume=resume)
        return
    mapper = SemSegMapper(cfg, is_train=is_train)
    head, limit = cfg.MODEL.SEM_SEG_HEAD, cfg.DATALOADER.MAX_UNREADABLE if resume else 0
    sample = cfg.DATASETS.CHECK_SAMPLE
    records = quick_check(name, head.NUM_CLASSES, head.IGNORE_VALUE, sample, max_unreadable=limit)
    ReadableDataset(records[: limit + 1], mapper, limit)[0]


def _check_model(cfg: CfgNode, *, eval_only: bool, resume: bool) -> None:
    """Build the model without its values, and hold solver and checkpoint against it."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        try:
            with torch.device("meta"):
                model = build_model(cfg)
        except NotImplementedError:  # a module that needs values while it is built
            model = build_model(cfg)
        check_protocol(cfg, model)
        if not eval_only:
            build_lr_scheduler(cfg, build_optimizer(cfg, model))
    except ConfigError:
        raise
    except (
        *(ValueError, KeyError, TypeError, IndexError, AttributeError),
        *(RuntimeError, AssertionError, ArithmeticError),
    ) as error:
        reason = " ".join(str(error).split()).strip("'\"").rstrip(".")
        if isinstance(error, KeyError) and " " not in reason:
            reason = (
                f"nothing in it is called '{reason}'; perhaps the features of MODEL.BACKBONE.NAME "
                f"'{cfg.MODEL.BACKBONE.NAME}' do not fit the heads"
            )
        raise ConfigError(f"The model cannot be built from this config: {reason}.") from error
    checkpointer = SeMaskCheckpointer(
        model, cfg.OUTPUT_DIR, allow_pickle=cfg.MODEL.ALLOW_PICKLE, complete=eval_only
    )
    if resume and checkpointer.has_checkpoint():
        with contextlib.suppress(DamagedCheckpointError):  # then it is the one before
            checkpointer.check(checkpointer.get_checkpoint_file())
        return
    if eval_only and not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "--eval-only has no weights to evaluate: give MODEL.WEIGHTS a checkpoint, or add "
            f"--resume to take the last one in OUTPUT_DIR '{cfg.OUTPUT_DIR}'."
        )
    checkpointer.check(cfg.MODEL.WEIGHTS)
