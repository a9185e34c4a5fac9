"""A semantic-prior loss that does nothing is pointed out."""

import logging

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)


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
                "supervised. Is every label ignored, or is a loss weight 0?",
                self._steps,
            )
