"""Functions for a complete training run (also in notebooks) and for evaluating a checkpoint."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from semask.checkpoint import SeMaskCheckpointer
from semask.engine.launch.checks import check_run
from semask.engine.launch.distributed import watched_peers
from semask.engine.restored import without_pretrained
from semask.engine.trainer import Trainer
from semask.engine.weights import WeightAverage
from semask.tasks import build_task, evaluated_weights
from semask.utils.device import resolve_device
from semask.utils.precision import evaluation_autocast


def train(cfg: CfgNode, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Check a run, train in this process, and evaluate.

    Args:
        cfg: of :func:`semask.load_config`; it is not changed. Without a GPU the CPU is used.
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one.
        overwrite: start over even if OUTPUT_DIR has checkpoints of an earlier run.

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
    trainer = Trainer(cfg, resume=resume)
    trainer.resume_or_load(resume=resume, overwrite=overwrite)
    trainer.train()
    return trainer.results


def evaluate(cfg: CfgNode, *, resume: bool) -> None:
    """Evaluate a checkpoint, and the averaged weights in it where SOLVER.EMA is enabled.

    Args:
        cfg: of the run.
        resume: evaluate the last checkpoint in OUTPUT_DIR, if there is one; else MODEL.WEIGHTS.

    Raises:
        CheckpointError: it cannot be used, or is no complete model.
        DataError: the data cannot be used.
    """
    model = Trainer.build_model(without_pretrained(cfg))
    ema = WeightAverage(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
    averaged: dict[str, Any] = {} if ema is None else {"ema": ema}
    checkpointer = SeMaskCheckpointer(
        model, cfg.OUTPUT_DIR, allow_pickle=cfg.MODEL.ALLOW_PICKLE, complete=True, **averaged
    )
    if resume and checkpointer.has_checkpoint():
        rest = checkpointer.resume_or_load("")
    else:
        rest = checkpointer.load(cfg.MODEL.WEIGHTS)
    last = rest.get("iteration")  # the last step, from 0 on
    steps = last + 1 if isinstance(last, int) else None
    with watched_peers(), evaluated_weights(checkpointer.loaded, steps):
        Trainer.test_with_average(cfg, model, ema)
        if comm.is_main_process():
            with evaluation_autocast(cfg):
                build_task(cfg).draw_panels(model)
        comm.synchronize()  # the others stay while the main process draws
