"""A whole training as one call, for notebooks and programs."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from semask.engine.launch.checks import check_run
from semask.engine.trainer import Trainer
from semask.utils.device import resolve_device


def train(cfg: CfgNode, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Check a run, train in this process, and evaluate.

    Args:
        cfg: of :func:`semask.load_config`; it is not changed. Without a GPU the CPU is used.
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one.
        overwrite: start anew also where OUTPUT_DIR has checkpoints of an earlier run.

    Returns:
        The results of the last evaluation, such as {"sem_seg": {"mIoU": 71.6, ...}}, percent; with
        several datasets of ``DATASETS.TEST`` by their names. Weights, report and the rest are in
        OUTPUT_DIR.

    Raises:
        ConfigError: the config contradicts itself, this machine, or what is in OUTPUT_DIR.
        DataError: the data cannot be used.
        CheckpointError: a checkpoint cannot be used.
        NonFiniteLossError: a loss is infinite or NaN.
    """
    cfg = cfg.clone()
    cfg.defrost()
    resolve_device(cfg, 1, explicit=False)
    check_run(cfg, world_size=comm.get_world_size(), resume=resume, overwrite=overwrite)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume, overwrite=overwrite)
    trainer.train()
    return trainer.results
