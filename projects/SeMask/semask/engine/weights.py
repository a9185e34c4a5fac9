"""Weights that a run keeps beside the last ones: their moving average, and the best so far."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from semask.checkpoint import write_checkpoint
from semask.checkpoint.reading import read_checkpoint
from semask.engine.batch_norm import broadcast_buffers
from semask.errors import CheckpointError

logger = logging.getLogger(__name__)


class WeightAverage:
    """average = d * average + (1 - d) * weights, after each step.

    Parameters and running statistics are averaged, integers (counters) are copied. The decay d
    rises with the number of steps n, min(decay, (1 + n) / (10 + n)), so that the initial weights do
    not dominate the average of a short run. ``state_dict`` has no weights before the first step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: possibly wrapped for distributed training.
            decay: d, 0..1, for instance 0.999.
        """
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._decay = decay
        self._step_decay = decay
        self._averaged: AveragedModel | None = None

    @property
    def started(self) -> bool:
        """Whether there is an average yet."""
        return self._averaged is not None

    def update(self) -> None:
        """Add the weights after a step."""
        if self._averaged is None:
            self._averaged = self._copy()
        steps = int(self._averaged.n_averaged)  # on the CPU: no waiting for a GPU
        self._step_decay = min(self._decay, (1 + steps) / (10 + steps))
        self._averaged.update_parameters(self._model)

    def broadcast_buffers(self) -> None:
        """See :func:`semask.engine.batch_norm.broadcast_buffers`."""
        if self._averaged is not None:
            broadcast_buffers(self._averaged.module)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the averaged weights."""
        weights = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._model.load_state_dict(self.weights())
        try:
            yield
        finally:
            self._model.load_state_dict(weights)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, by the model's names."""
        return {} if self._averaged is None else self._averaged.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Average and number of steps."""
        steps = 0 if self._averaged is None else int(self._averaged.n_averaged)
        return {"steps": steps, "model": self.weights()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of ``state_dict``.

        Raises:
            ValueError: it is of another model.
        """
        steps, found = state_dict["steps"], state_dict["model"]
        if not found:
            self._averaged = None
            return
        wanted = self._model.state_dict()
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
            raise ValueError("the averaged weights are of another model")
        self._averaged = self._copy()
        self._averaged.module.load_state_dict(found)
        self._averaged.n_averaged.fill_(steps)

    def _copy(self) -> AveragedModel:
        return AveragedModel(self._model, multi_avg_fn=self._average, use_buffers=True)

    @torch.no_grad()
    def _average(
        self,
        averages: tuple[Tensor, ...] | list[Tensor],
        weights: tuple[Tensor, ...] | list[Tensor],
        steps: Tensor | int,
    ) -> None:
        """One step, for tensors of one device and type."""
        if averages[0].is_floating_point():
            get_ema_multi_avg_fn(self._step_decay)(averages, weights, steps)
        else:
            torch._foreach_copy_(averages, weights)


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
    """One file with the best weights so far, without an optimizer: not for resuming.

    Attributes:
        path: of the file.
        metric: name of the result that is compared.
    """

    def __init__(self, folder: str, name: str, metric: str) -> None:
        """
        Args:
            folder: of the file.
            name: of the file, without ".pth".
            metric: name of the result to compare; larger is better.
        """
        self.path = os.path.join(folder, f"{name}.pth")
        self.metric = metric
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
        if content.get("metric") == self.metric and isinstance(value, float | int):
            self._best = float(value)

    def update(self, results: Mapping[str, Any], weights: Mapping[str, Tensor], step: int) -> None:
        """Write the weights if their result is the best so far.

        Args:
            results: of an evaluation, by name.
            weights: parameters and buffers, by name.
            step: number of the iteration after which they were evaluated.
        """
        value = results.get(self.metric)
        if value is None:
            known = ", ".join(sorted(results)) or "none"
            logger.warning("No best checkpoint: no result is '%s' (%s)", self.metric, known)
        elif not math.isfinite(value):
            logger.warning("No best checkpoint: %s is %s", self.metric, value)
        elif self._best is None or value > self._best:
            logger.info("%s %.4f is the best so far: %s", self.metric, value, self.path)
            entry = {"iteration": step, "metric": self.metric, "value": float(value)}
            write_checkpoint(self.path, {"model": dict(weights), **entry})
            self._best = float(value)
