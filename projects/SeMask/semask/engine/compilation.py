"""``torch.compile`` for training, where it works."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from semask.tasks import build_task
from semask.utils.precision import Precision
from semask.utils.text import one_line

logger = logging.getLogger(__name__)


class CompiledParts:
    """The compiled forward passes of a model's backbone and heads.

    They are used only inside ``active``. Evaluation runs the model uncompiled: it would compile
    for each of the many image sizes. Names of parameters do not change.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: its direct children are compiled, each on its own.
        """
        self._forwards = {
            part: torch.compile(part.forward, dynamic=False)  # training images have one size
            for part in model.children()
            if any(True for _ in part.parameters())
        }

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the model runs compiled."""
        for part, forward in self._forwards.items():
            part.forward = forward
        try:
            yield
        finally:
            for part in self._forwards:
                del part.forward  # the method of the class is called again


def compile_for_training(
    cfg: CfgNode, model: nn.Module, precision: Precision
) -> CompiledParts | None:
    """The compiled parts for ``SOLVER.COMPILE``; None if it is off or does not work.

    Args:
        cfg: of the run.
        model, precision: see :func:`compile_parts`.
    """
    if not cfg.SOLVER.COMPILE:
        return None
    task = build_task(cfg)
    if not task.fixed_size:
        logger.warning(
            "SOLVER.COMPILE: TASK '%s' is trained without torch.compile, which would recompile "
            "for each image size.",
            cfg.TASK,
        )
        return None
    count = cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.ACCUMULATE_STEPS * comm.get_world_size())
    return compile_parts(model, task.placeholder_inputs(task.training_size(), count), precision)


def compile_parts(
    model: nn.Module, batch: list[dict[str, Any]], precision: Precision
) -> CompiledParts | None:
    """Compile a model and try it; the model is unchanged.

    Args:
        model: in training mode, on its device, not yet wrapped for distributed training.
        batch: of the sizes that it will be trained with; its values do not matter.
        precision: of the training.

    Returns:
        The compiled parts, or None where they do not work: a warning says why.
    """
    state = {name: value.clone() for name, value in model.state_dict().items()}
    logger.info("Compiling the model; this can take minutes.")
    try:
        parts = CompiledParts(model)
        with parts.active():
            with precision.autocast():
                losses = model(batch)
            torch.stack(list(losses.values())).sum().backward()
    except Exception as error:  # whatever the compiler raises, the model can train without it
        reason = one_line(error)
        logger.warning(
            "SOLVER.COMPILE: torch.compile failed, so the model is trained without it (%s).",
            reason[:300],
        )
        return None
    finally:
        model.zero_grad(set_to_none=True)
        model.load_state_dict(state)
    return parts
