"""An exponential moving average of the weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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
        self._steps = 0
        self._average: dict[str, Tensor] = {}

    @property
    def started(self) -> bool:
        """Whether there is an average."""
        return bool(self._average)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        weights = self._model.state_dict()
        if not self._average:
            self._average = {name: value.detach().clone() for name, value in weights.items()}
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        for name, value in weights.items():
            if value.is_floating_point():
                self._average[name].lerp_(value, 1 - decay)
            else:
                self._average[name].copy_(value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights."""
        weights = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._model.load_state_dict(self._average)
        try:
            yield
        finally:
            self._model.load_state_dict(weights)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, by the model's names."""
        return self._average

    def state_dict(self) -> dict[str, Any]:
        """Average and number of steps."""
        return {"steps": self._steps, "model": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            ValueError: it is of another model.
        """
        wanted = self._model.state_dict()
        found = state_dict["model"]
        if found and {k: v.shape for k, v in found.items()} != {
            k: v.shape for k, v in wanted.items()
        }:
            raise ValueError("the averaged weights are of another model")
        self._steps = state_dict["steps"]
        self._average = {
            name: value.to(wanted[name].device, copy=True) for name, value in found.items()
        }
