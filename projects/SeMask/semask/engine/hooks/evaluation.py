"""What happens during training beside Detectron2's own hooks."""

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook

from semask.tasks import build_task
from semask.utils.precision import evaluation_autocast


class EvaluationHook(EvalHook):
    """Detectron2's evaluation, but not after a run that has failed in its last iteration."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class PanelsHook(HookBase):
    """Draw predictions at each evaluation, into the picture file and into TensorBoard.

    For the main process, between Detectron2's ``EvalHook`` (same period) and the writers.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: of the run; its task draws the panels, every ``TEST.EVAL_PERIOD`` iterations.
        """
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
        with evaluation_autocast(self._cfg):
            picture = build_task(self._cfg).draw_panels(self.trainer.model)
        if picture is not None:
            self.trainer.storage.put_image("panels", picture.transpose(2, 0, 1))
