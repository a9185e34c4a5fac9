"""Data loaders of a run, for training and evaluation."""

import logging

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.utils import comm

from semask.data.training_loader import TrainingLoader, loading_processes
from semask.data.unreadable import ReadableBatches, ReadableDataset, UnreadableFiles
from semask.tasks import build_task
from semask.utils.randomness import shared_seed

logger = logging.getLogger(__name__)


def build_train_loader(cfg: CfgNode) -> TrainingLoader:
    """Endless batches of ``DATASETS.TRAIN`` through the mapper of ``TASK``."""
    task = build_task(cfg)
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=task.filter_empty)
    limit = cfg.DATALOADER.MAX_UNREADABLE
    mapper = task.build_mapper(is_train=True)
    logger.info("Augmentations in training: %s", mapper.augmentations.augs)
    return TrainingLoader(
        ReadableDataset(records, mapper, limit),
        images_per_step=cfg.SOLVER.IMS_PER_BATCH,
        accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
        seed=shared_seed(cfg.SEED),
        num_workers=loading_processes(cfg.DATALOADER.NUM_WORKERS),
        max_unreadable=limit,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> ReadableBatches:
    """The images of a dataset, one by one, except unreadable ones."""
    records = get_detection_dataset_dicts([dataset_name], filter_empty=False)
    limit = cfg.DATALOADER.MAX_UNREADABLE
    mapper = build_task(cfg).build_mapper(is_train=False)
    logger.info("Augmentations in evaluation: %s", mapper.augmentations.augs)
    loader = build_detection_test_loader(
        ReadableDataset(records, mapper, limit, replace=False),
        mapper=None,
        num_workers=loading_processes(cfg.DATALOADER.NUM_WORKERS),
    )
    return ReadableBatches(loader, UnreadableFiles(limit, f"dataset '{dataset_name}'"))


def log_batch_size(cfg: CfgNode) -> None:
    """Log the images of a step, by process and accumulated part."""
    processes, parts = comm.get_world_size(), cfg.SOLVER.ACCUMULATE_STEPS
    images = cfg.SOLVER.IMS_PER_BATCH
    logger.info(
        "Effective batch size: %d images a step (%d process(es) x %d images x %d accumulated)",
        images,
        processes,
        images // (processes * parts),
        parts,
    )
