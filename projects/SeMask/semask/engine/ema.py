"""An exponential moving average of the weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """average = d * average + (1 - d) * weights, after each step.

    Parameters and running statistics are averaged, integers (counters) are copied. The decay d
    rises with the steps, min(decay, (1 + n) / (10 + n)), so that a short run has not the initial
    weights in its average. ``state_dict`` is empty before the first step.
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
