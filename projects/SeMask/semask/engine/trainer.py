"""Detectron2's DefaultTrainer with this project's data, optimizer, checkpoints and evaluation."""

import logging
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from semask.checkpoint import SeMaskCheckpointer
from semask.data.mapper import SemSegMapper
from semask.evaluation import SemSegConfusionEvaluator
from semask.solver import build_lr_scheduler, build_optimizer

from .hooks import PanelsHook

logger = logging.getLogger(__name__)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """``model`` for training in several processes, on the device that it is on.

    Detectron2's own wrapping takes a GPU for granted.

    Args:
        model: on its device already.

    Returns:
        The model in ``DistributedDataParallel``, or as it is in a single process.
    """
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    device_ids = None if device.type == "cpu" else [device]
    # The ranks' BatchNorm statistics are equal already or meant to differ: no broadcast.
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


class Trainer(DefaultTrainer):
    """Builds everything from a config, trains, evaluates, and resumes exactly where it stopped."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: frozen or not; it is not changed.
        """
        # DefaultTrainer's own would wrap the model for GPUs and load checkpoints leniently.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = wrap_ddp(model)
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer_class(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SeMaskCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, and the panels after the evaluation."""
        hooks = super().build_hooks()
        if comm.is_main_process():
            hooks.insert(len(hooks) - 1, PanelsHook(self.cfg))  # the writers come last
        return hooks

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, optimizer and schedule, all plain types.

        Detectron2 v0.6 leaves the optimizer out, and depending on the versions of Detectron2 and
        torch its hook leaves the schedule out.
        """
        return {
            **TrainerBase.state_dict(self),
            "_trainer": self._trainer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model on its device; its size is logged."""
        model = build_model(cfg)
        parts = ", ".join(f"{name} {_size(part)}" for name, part in model.named_children())
        logger.info(
            "%s: %s parameters (%s) on %s",
            *(cfg.MODEL.META_ARCHITECTURE, _size(model), parts, cfg.MODEL.DEVICE),
        )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """See :func:`semask.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """See :func:`semask.solver.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        """Endless batches of ``DATASETS.TRAIN`` through :class:`SemSegMapper`."""
        mapper = SemSegMapper(cfg, is_train=True)
        # Crops have one size: grouping images by aspect ratio would only change their order.
        return build_detection_train_loader(cfg, mapper=mapper, aspect_ratio_grouping=False)

    @classmethod
    def build_test_loader(
        cls, cfg: CfgNode, dataset_name: str
    ) -> torch.utils.data.DataLoader[list[dict[str, Any]]]:
        """The images of a dataset, one by one."""
        mapper = SemSegMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of a dataset; its report goes to OUTPUT_DIR/inference/DATASET."""
        return SemSegConfusionEvaluator(
            dataset_name,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name),
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        )


def _size(module: nn.Module) -> str:
    """Number of parameters, as "1,234"."""
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"
