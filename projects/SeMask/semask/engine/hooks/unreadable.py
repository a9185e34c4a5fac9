"""What training has skipped, named at its end."""

import logging
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from semask.data.loading.unreadable import UnreadableFiles

logger = logging.getLogger(__name__)


class UnreadableFilesHook(HookBase):
    """Name, after the training, the files that it has skipped, in all processes of a run."""

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
                *(len(reasons), self._unreadable.what),
                "\n".join(f"    {reason}" for reason in reasons.values()),
            )

    def state_dict(self) -> dict[str, Any]:
        reasons = self._unreadable.reasons
        return {"reasons": dict(reasons)} if reasons else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._unreadable.reasons = {**state_dict["reasons"], **self._unreadable.reasons}
