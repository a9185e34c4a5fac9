"""Keeps the weights with the best evaluation result."""

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from semask.checkpoint import write_checkpoint
from semask.checkpoint.reading import read_checkpoint
from semask.errors import CheckpointError

logger = logging.getLogger(__name__)


def best_checkpoints(cfg: CfgNode) -> "dict[str, BestCheckpoint]":
    """The best checkpoints of a config, by file name: of the weights, and of the averaged ones."""
    if not cfg.TEST.BEST_METRIC or not cfg.DATASETS.TEST:
        return {}
    metric = cfg.TEST.BEST_METRIC
    if len(cfg.DATASETS.TEST) > 1:  # results are then grouped by dataset
        metric = f"{cfg.DATASETS.TEST[0]}/{metric}"
    metrics = {"model_best": metric}
    if cfg.SOLVER.EMA.ENABLED:
        metrics["model_best_ema"] = f"ema/{metric}"
    return {name: BestCheckpoint(cfg.OUTPUT_DIR, name, key) for name, key in metrics.items()}


class BestCheckpoint:
    """One file with the best weights so far, without an optimizer: not for resuming."""

    def __init__(self, folder: str, name: str, metric: str) -> None:
        """
        Args:
            folder: where the file goes.
            name: its name, without ".pth".
            metric: what its result is called; larger is better.
        """
        self.path = os.path.join(folder, f"{name}.pth")
        self._metric = metric
        self._best: float | None = None

    def restore(self) -> None:
        """Resume from the file that an earlier run left, if it is usable."""
        if not os.path.isfile(self.path):
            return
        try:
            content = read_checkpoint(self.path)
        except CheckpointError as error:
            logger.warning("The best checkpoint so far cannot be used: %s", error)
            return
        value = content.get("value")
        if content.get("metric") == self._metric and isinstance(value, float | int):
            self._best = float(value)

    def update(self, results: Mapping[str, Any], weights: Mapping[str, Tensor], step: int) -> None:
        """Write the weights if their result is the best so far.

        Args:
            results: of an evaluation, by name.
            weights: parameters and buffers, by name.
            step: number of the iteration after which they were evaluated.
        """
        value = results.get(self._metric)
        if value is None:
            known = ", ".join(sorted(results)) or "none"
            logger.warning("No best checkpoint: no result is '%s' (%s)", self._metric, known)
        elif not math.isfinite(value):
            logger.warning("No best checkpoint: %s is %s", self._metric, value)
        elif self._best is None or value > self._best:
            logger.info("%s %.4f is the best so far: %s", self._metric, value, self.path)
            entry = {"iteration": step, "metric": self._metric, "value": float(value)}
            write_checkpoint(self.path, {"model": dict(weights), **entry})
            self._best = float(value)
