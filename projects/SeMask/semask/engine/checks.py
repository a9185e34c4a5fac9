"""What can be wrong with a run, found before anything is built for long or written.

The parts check their own arguments; here is what crosses them: config against machine, datasets
against model, checkpoint against model.
"""

import difflib
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from semask.checkpoint import SeMaskCheckpointer
from semask.config import ConfigError
from semask.data.mapper import SemSegMapper
from semask.data.reading import DataError
from semask.solver import build_lr_scheduler, build_optimizer


def resolve_device(cfg: CfgNode, num_gpus: int, *, explicit: bool) -> None:
    """Let ``MODEL.DEVICE`` fall back to "cpu" where there is no GPU, and refuse what cannot work.

    Args:
        cfg: not frozen; ``MODEL.DEVICE`` is changed in place.
        num_gpus: GPUs asked for on this machine; 0 means the CPU.
        explicit: the user has asked for this very device, so it does not fall back.

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


def check_run(
    cfg: CfgNode, *, world_size: int = 1, eval_only: bool = False, resume: bool = False
) -> None:
    """Refuse a run that would fail later.

    Args:
        cfg: the whole config; ``MODEL.DEVICE`` has been resolved.
        world_size: number of processes of the run.
        eval_only: nothing is trained.
        resume: the checkpoint is the last one in ``OUTPUT_DIR``, if there is one.

    Raises:
        ConfigError: keys that contradict each other, a dataset, or this machine.
        DataError: a dataset is missing, empty or unreadable.
        CheckpointError: ``MODEL.WEIGHTS`` is missing, unsafe or of another model.
    """
    sharing = cfg.SOLVER.REFERENCE_WORLD_SIZE or world_size  # with the former, batches are scaled
    if not eval_only and cfg.SOLVER.IMS_PER_BATCH % sharing:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {sharing} processes "
            "cannot share equally."
        )
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda") and not eval_only:
        raise ConfigError(
            "SOLVER.AMP.ENABLED needs a CUDA device, "
            f"but the model is on '{cfg.MODEL.DEVICE}': set it to False."
        )
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name at least one dataset to train on.")
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    for name in names:
        check_metadata(cfg, name)
    _check_model(cfg, eval_only=eval_only, resume=resume)
    for name in names:
        check_first_image(cfg, name, is_train=not eval_only and name in cfg.DATASETS.TRAIN)


def check_metadata(cfg: CfgNode, name: str) -> None:
    """Hold a dataset's name, classes and ignore value against the config.

    Raises:
        ConfigError: the dataset is not registered, or it has other classes than the model.
    """
    registered = DatasetCatalog.list()
    if name not in registered:
        near = difflib.get_close_matches(name, registered, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"DATASETS names '{name}', but no such dataset is registered.{hint}")
    head = cfg.MODEL.SEM_SEG_HEAD
    metadata = MetadataCatalog.get(name)
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


def check_first_image(cfg: CfgNode, name: str, *, is_train: bool) -> None:
    """List a dataset (which may generate it) and take its first image through the pipeline.

    Raises:
        DataError: it is missing or empty, or that image or its label map cannot be used.
        ConfigError: the input pipeline cannot be built from the config.
    """
    mapper = SemSegMapper(cfg, is_train=is_train)
    records = _records(name)
    if not records:
        raise DataError(f"Dataset '{name}' has no images.")
    mapper(records[0])


def _records(name: str) -> list[dict[str, Any]]:
    try:
        return DatasetCatalog.get(name)
    except (OSError, AssertionError) as error:  # from loaders of Detectron2 itself
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        reason = " ".join(str(error).split())
        raise DataError(
            f"Dataset '{name}' cannot be listed: {reason}. Datasets are looked for in '{root}' "
            "(environment variable DETECTRON2_DATASETS)."
        ) from error


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
    except (ValueError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split()).strip("'\"").rstrip(".")
        raise ConfigError(f"The model cannot be built from this config: {reason}.") from error
    if not eval_only:
        build_lr_scheduler(cfg, build_optimizer(cfg, model))
    checkpointer = SeMaskCheckpointer(model, cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        return
    if eval_only and not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "--eval-only has no weights to evaluate: give MODEL.WEIGHTS a checkpoint, or add "
            f"--resume to take the last one in OUTPUT_DIR '{cfg.OUTPUT_DIR}'."
        )
    checkpointer.check(cfg.MODEL.WEIGHTS)
