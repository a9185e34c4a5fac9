"""One optimizer step: batches, gradients, values shared between the processes, update.

A loss that is not finite ends the run before it spoils the weights.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from semask.data.training_loader import TrainingLoader
from semask.engine.compilation import CompiledParts
from semask.modeling.losses.divisor import shares, without_layer
from semask.modeling.meta_arch.semantic import SeMaskSegmentor
from semask.utils.files import replacing
from semask.utils.precision import Precision
from semask.utils.randomness import seed_step


class TrainStep:
    """What Detectron2's trainer runs in every iteration (its ``SimpleTrainer``'s place).

    Attributes:
        model, optimizer, data_loader: what it was built with.
        iter: number of the iteration, set by the trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: TrainingLoader,
        optimizer: Optimizer,
        *,
        precision: Precision | None = None,
        accumulate_steps: int = 1,
        compiled: CompiledParts | None = None,
        output_dir: str = "",
    ) -> None:
        """
        Args:
            model: returns a dictionary of scalar losses for a batch; possibly wrapped for
                distributed training.
            data_loader: endless batches.
            optimizer: of the model's parameters.
            precision: of the computation; None = float32.
            accumulate_steps: batches that make up a step; segmentation models need all of them at
                its start.
            compiled: of the model, where it has been compiled.
            output_dir: where a batch with a loss that is not finite is listed.
        """
        self.model = model.train()
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.iter = 0
        self._precision = precision or Precision()
        self._accumulate_steps = accumulate_steps
        self._compiled = compiled
        self._output_dir = output_dir
        self._batches: Iterator[list[dict[str, Any]]] | None = None

    def run_step(
        self, stop: bool = False, after_backward: Callable[[], None] | None = None
    ) -> bool:
        """Train on the next batches.

        Args:
            stop: this process has been told to end.
            after_backward: called after the backward pass, before the optimizer's step.

        Returns:
            Whether any process of the run has been told to end; all processes return the same.

        Raises:
            NonFiniteLossError: a loss of any process is infinite or NaN. The weights have not
                been updated.
            DataError: a file cannot be used, or all processes have skipped too many.
        """
        assert self.model.training, "the model was left in evaluation mode"
        losses: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        with contextlib.nullcontext() if self._compiled is None else self._compiled.active():
            data_time = 0.0
            files: list[str] = []
            batches = self._weighted_batches()
            for part in range(self._accumulate_steps):
                start = time.perf_counter()
                batch, weights = next(batches)
                data_time += time.perf_counter() - start
                files += [str(sample.get("file_name", "?")) for sample in batch]
                seed_step(self.data_loader.seed, self.iter, comm.get_rank(), part)
                is_last = part == self._accumulate_steps - 1
                for name, value in self._accumulate(batch, weights, is_last).items():
                    losses[name] = losses.get(name, 0) + value
        unreadable = self.data_loader.unreadable
        news = {"data_time": data_time, "stop": stop, "skipped": len(unreadable.pending)}
        shared = _share({**losses, **news})
        times = [own.pop("data_time") for own in shared]
        stops = [own.pop("stop") for own in shared]
        skips = [own.pop("skipped") for own in shared]
        if any(skips):
            unreadable.sync()
        refuse_nonfinite(shared, files, iteration=self.iter, folder=self._output_dir)
        if after_backward is not None:
            after_backward()
        self._precision.step(self.optimizer)
        if comm.is_main_process():
            _write_metrics(shared, max(times))
        return any(stops)

    def close(self) -> None:
        """End the data loading processes."""
        self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scale of the loss, and place in the data."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "precision": self._precision.state_dict(),
            "data": self.data_loader.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._precision.load_state_dict(state_dict["precision"])
        self.data_loader.load_state_dict(state_dict["data"])
        self._batches = None

    def _next_batch(self) -> list[dict[str, Any]]:
        if self._batches is None:
            self._batches = iter(self.data_loader)
        return next(self._batches)

    def _weighted_batches(self) -> Iterator[tuple[list[dict[str, Any]], Mapping[str, float]]]:
        """The batches of a step, and the weights of their losses; without one a loss is averaged.

        The weights depend on all batches, so these are loaded before the first one is returned.
        """
        model = self.model
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if self._accumulate_steps == 1 or not isinstance(model, SeMaskSegmentor):
            for _ in range(self._accumulate_steps):
                yield self._next_batch(), {}
            return
        batches = [self._next_batch() for _ in range(self._accumulate_steps)]
        weights = shares([model.loss_divisors(batch) for batch in batches])
        yield from zip(batches, weights, strict=True)

    def _accumulate(
        self, batch: list[dict[str, Any]], weights: Mapping[str, float], is_last: bool
    ) -> dict[str, Tensor]:
        """Add the gradients of a part of the step; returns its share of the step's losses."""
        # The processes add up their gradients once, with the last batch.
        wait: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            wait = self.model.no_sync()
        with wait:
            with self._precision.autocast():
                losses = self.model(batch)
            parts: dict[str, Tensor] = {}
            for name, value in losses.items():
                weight = weights.get(without_layer(name))
                parts[name] = value / self._accumulate_steps if weight is None else value * weight
            self._precision.backward(torch.stack(list(parts.values())).sum())
        return {name: value.detach() for name, value in parts.items()}


def _share(values: Mapping[str, Tensor | float]) -> list[dict[str, float]]:
    """The numbers of each process, exchanged at once; all processes need the same names."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    device = torch.device("cuda" if on_gpu else "cpu")
    own = torch.stack(
        [torch.as_tensor(value, dtype=torch.float64).to(device) for value in values.values()]
    )
    rows = [own]
    if comm.get_world_size() > 1:
        rows = [torch.empty_like(own) for _ in range(comm.get_world_size())]
        dist.all_gather(rows, own)
    return [dict(zip(values, row, strict=True)) for row in torch.stack(rows).tolist()]


def _write_metrics(losses: list[dict[str, float]], data_time: float) -> None:
    """The losses, averaged over the processes, into Detectron2's event storage."""
    storage = get_event_storage()
    means = {name: sum(own[name] for own in losses) / len(losses) for name in losses[0]}
    storage.put_scalar("data_time", data_time)
    storage.put_scalar("total_loss", sum(means.values()))
    storage.put_scalars(**means)


REPORT = "nonfinite_batch.json"


class NonFiniteLossError(FloatingPointError):
    """A loss became infinite or NaN; the message names the images of the batch."""


def refuse_nonfinite(
    losses: Sequence[Mapping[str, float]],
    files: Sequence[str],
    *,
    iteration: int,
    folder: str,
) -> None:
    """Raise if a loss of any process is not finite; all processes must call it together.

    Args:
        losses: of each process, by name; the same list in all of them.
        files: the images of this process in this step.
        iteration: number of the step.
        folder: where the main process writes the report; "" = nowhere.

    Raises:
        NonFiniteLossError: in all processes alike.
    """
    broken = [rank for rank, own in enumerate(losses) if not _finite(own)]
    if not broken:
        return
    all_files = comm.all_gather(list(files))
    report = [
        {
            "process": rank,
            "losses": {name: _text(value) for name, value in losses[rank].items()},
            "files": all_files[rank],
        }
        for rank in broken
    ]
    where = ""
    if folder:
        path = os.path.join(folder, REPORT)
        where = f" The batch is listed in '{path}'."
        if comm.is_main_process():
            with replacing(path) as file:
                text = json.dumps({"iteration": iteration, "batches": report}, indent=1)
                file.write(text.encode())
    names = [name for rank in broken for name in all_files[rank]]
    values = ", ".join(f"{name} = {_text(value)}" for name, value in losses[broken[0]].items())
    raise NonFiniteLossError(
        f"The loss is not finite at iteration {iteration} ({values}), for the images "
        f"{', '.join(names)}. The weights have not been updated.{where} Check these images and "
        "labels, lower SOLVER.BASE_LR, or turn SOLVER.AMP off; --resume continues from the last "
        "checkpoint."
    )


def _finite(losses: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in losses.values())


def _text(value: Any) -> str:
    """A number as text, since JSON has no NaN."""
    return str(value)
