"""Running a model on single images, for pictures."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# From a dataset dict, which it may change, to a model's input.
Mapper = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; afterwards every module is in its own mode again.

    Args:
        model: possibly wrapped in ``DistributedDataParallel``.

    Yields:
        The model, unwrapped.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    modes = [(module, module.training) for module in model.modules()]  # frozen parts differ
    model.eval()
    try:
        # Not inference_mode: tensors that a model caches have to stay fit for training.
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training


def predict(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """A model's answer for one image, with its semantic-prior maps if it offers them.

    Args:
        model: called as ``model.inference([inputs], return_priors=True)`` where that exists,
            else as a stock Detectron2 model, ``model([inputs])``.
        inputs: what the mapper made of a dataset dict.

    Returns:
        "sem_seg" (K, H, W), and perhaps "prior" (K, H, W) and "priors" {"prior2": (K, h, w), ...}.
    """
    inference = getattr(model, "inference", None)
    # Stock models may have an ``inference`` of other arguments.
    if callable(inference) and "return_priors" in inspect.signature(inference).parameters:
        return inference([inputs], return_priors=True)[0]
    return model([inputs])[0]


def class_map(scores: torch.Tensor) -> np.ndarray:
    """(K, H, W) scores to (H, W) classes."""
    return scores.argmax(dim=0).cpu().numpy()
