"""Training hooks besides Detectron2's own."""

import datetime
import logging
import time
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm

from semask.data.unreadable import UnreadableFiles
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


logger = logging.getLogger(__name__)

# A run that takes longer than this on a CPU is probably not intended.
_LONG_ON_CPU = 2 * 3600


class PriorLossWatch(HookBase):
    """Warn once when ``loss_prior`` has been exactly 0 in many steps in a row.

    For the main process, which knows the losses.
    """

    def __init__(self, patience: int = 100) -> None:
        """
        Args:
            patience: steps before the warning.
        """
        self._patience = patience
        self._steps = 0

    def after_step(self) -> None:
        value, iteration = self.trainer.storage.latest().get("loss_prior", (None, -1))
        if iteration != self.trainer.iter:
            return
        self._steps = self._steps + 1 if value == 0 else 0
        if self._steps == self._patience:
            self._patience = -1  # once
            logger.warning(
                "loss_prior has been exactly 0 for %d iterations: the semantic layers are not "
                "supervised. Check whether every label is ignored, or a loss weight is 0.",
                self._steps,
            )


class UnreadableFilesHook(HookBase):
    """Log, after the training, the files that were skipped, in all processes of a run."""

    def __init__(self, unreadable: UnreadableFiles) -> None:
        """
        Args:
            unreadable: that of the training loader (``ReadableBatches.unreadable``).
        """
        self._unreadable = unreadable

    def after_train(self) -> None:
        reasons = self._unreadable.reasons
        if reasons and comm.is_main_process():
            logger.warning(
                "%d files of %s could not be read and were skipped:\n%s",
                len(reasons),
                self._unreadable.what,
                "\n".join(f"    {reason}" for reason in reasons.values()),
            )

    def state_dict(self) -> dict[str, Any]:
        reasons = self._unreadable.reasons
        return {"reasons": dict(reasons)} if reasons else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._unreadable.reasons = {**state_dict["reasons"], **self._unreadable.reasons}


class FirstStepHook(HookBase):
    """Log the first loss and the expected time of the run; on a CPU, warn of many hours.

    Detectron2's own line comes after 20 steps. For the main process, which knows the losses.
    """

    def __init__(self, device: str) -> None:
        """
        Args:
            device: ``MODEL.DEVICE``.
        """
        self._on_cpu = device == "cpu"
        self._began: float | None = None
        self._is_first = True

    def before_step(self) -> None:
        if self._is_first:
            self._began = time.perf_counter()

    def after_step(self) -> None:
        if not self._is_first or self._began is None:
            return
        self._is_first = False
        seconds = time.perf_counter() - self._began
        left = seconds * (self.trainer.max_iter - self.trainer.iter - 1)
        loss, _ = self.trainer.storage.latest().get("total_loss", (float("nan"), 0))
        logger.info(
            "First step: loss %.4g in %.2f s; at this rate the training ends in %s",
            loss,
            seconds,
            datetime.timedelta(seconds=round(left)),
        )
        if self._on_cpu and left > _LONG_ON_CPU:
            logger.warning(
                "On this CPU the training takes about %.0f hours. For a CPU there are "
                "own_dataset/semask_small_example and own_dataset/semask_coco_small_example; "
                "smaller images (INPUT) and a smaller SOLVER.MAX_ITER shorten any run.",
                left / 3600,
            )
