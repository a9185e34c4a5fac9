"""What happens during training beside Detectron2's own hooks."""

import os

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from torch import nn

from semask.data.mappers.semantic import SemSegMapper
from semask.report.panels import render_panels, save_picture


def panels_path(cfg: CfgNode) -> str | None:
    """The picture file that a run writes; None for detectors, and for ``TEST.NUM_PANELS`` 0."""
    if cfg.TEST.NUM_PANELS < 1 or not cfg.DATASETS.TEST or cfg.INPUT.MAPPER != "sem_seg":
        return None
    return os.path.join(cfg.OUTPUT_DIR, "panels.png")


def draw_panels(cfg: CfgNode, model: nn.Module) -> np.ndarray | None:
    """Write some predictions on the first dataset of ``DATASETS.TEST`` to ``panels_path``.

    To be called in the main process only.

    Args:
        cfg: the run's config.
        model: the model, possibly wrapped for distributed training; its mode is not changed.

    Returns:
        The picture, (height, width, 3) uint8, or None where none is asked for.
    """
    path = panels_path(cfg)
    if path is None:
        return None
    mapper = SemSegMapper(cfg, is_train=False)
    picture = render_panels(model, cfg.DATASETS.TEST[0], mapper, cfg.TEST.NUM_PANELS)
    save_picture(picture, path)
    return picture


class EvaluationHook(EvalHook):
    """Detectron2's evaluation, but not after a run that has failed in its last iteration."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class PanelsHook(HookBase):
    """Draw predictions at each evaluation, into the picture file and into TensorBoard.

    For the main process, between Detectron2's ``EvalHook`` (whose rhythm it has) and the writers.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        period = self._cfg.TEST.EVAL_PERIOD
        if period > 0 and done % period == 0 and done != self.trainer.max_iter:
            self._draw()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not after a failure
            self._draw()

    def _draw(self) -> None:
        picture = draw_panels(self._cfg, self.trainer.model)
        if picture is not None:
            self.trainer.storage.put_image("panels", picture.transpose(2, 0, 1))
