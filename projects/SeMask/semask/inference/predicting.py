"""Running a model for evaluators and for pictures, without scores that nobody reads."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semask.modeling.heads.base import ScoreKind
from semask.ops.lazy_scores import LazyScores, lazy

# From a dataset dict, which it may change, to a model's input.
Mapper = Callable[[dict[str, Any]], dict[str, Any]]


def gives_scores(model: nn.Module) -> bool:
    """Whether a model predicts single images and says what its scores are, as ``SeMaskSegmentor``.

    Its ``predict(inputs, return_priors)`` returns "sem_seg", of the model's ``score_kind``, and
    perhaps "prior", logits, each as a tensor (K, H, W) or as :class:`LazyScores`, and "priors",
    tensors {"prior2": (K, h, w), ...}.
    """
    return callable(getattr(model, "predict", None)) and hasattr(model, "score_kind")


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


def predict(model: nn.Module, inputs: dict[str, Any], priors: bool = True) -> dict[str, Any]:
    """A model's answer for one image, with its semantic-prior maps if it offers them.

    Args:
        model: called as ``model.predict(inputs, return_priors=...)`` if it ``gives_scores``; else
            as ``model.inference([inputs], return_priors=True)`` where that exists, and as a stock
            Detectron2 model, ``model([inputs])``, where it does not.
        inputs: what the mapper made of a dataset dict.
        priors: False = the maps are not needed.

    Returns:
        "sem_seg", :class:`LazyScores`, and perhaps "prior", :class:`LazyScores`, and "priors",
        tensors {"prior2": (K, h, w), ...}.
    """
    answer: Any = model
    kind: ScoreKind = "logits"  # of Detectron2's SemanticSegmentor and PanopticFPN
    if gives_scores(model):
        output = answer.predict(inputs, return_priors=priors)
        kind = answer.score_kind
    else:
        inference = getattr(model, "inference", None)
        # Stock models may have an ``inference`` of other arguments.
        if callable(inference) and "return_priors" in inspect.signature(inference).parameters:
            output = inference([inputs], return_priors=priors)[0]
        else:
            output = model([inputs])[0]
    kinds: dict[str, ScoreKind] = {"sem_seg": kind, "prior": "logits"}
    return {**output, **{key: lazy(output[key], kinds[key]) for key in kinds if key in output}}


def class_map(scores: LazyScores | torch.Tensor) -> np.ndarray:
    """Scores of K classes, as such or as (K, H, W), to (H, W) classes."""
    labels = scores.labels() if isinstance(scores, LazyScores) else scores.argmax(dim=0)
    return labels.cpu().numpy()


class ForEvaluators(nn.Module):
    """A model whose answers are computed as far as an evaluator asks for them.

    In place of "sem_seg" they have "scores", :class:`LazyScores`, for evaluators that can use them;
    "sem_seg", all scores in one tensor, is only made when it is read.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: one that ``gives_scores``.
        """
        super().__init__()
        self.model: Any = model
        self.training = model.training

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list["_Answer"]:
        """An answer for each image."""
        return [self._answer(inputs) for inputs in batched_inputs]

    def _answer(self, inputs: dict[str, Any]) -> "_Answer":
        output = predict(self.model, inputs, priors=False)
        if "sem_seg" in output:
            output["scores"] = output.pop("sem_seg")
        return _Answer(output)


class _Answer(dict[str, Any]):
    """What a model predicts, with "scores", :class:`LazyScores`, and "sem_seg" on demand."""

    def __missing__(self, key: str) -> torch.Tensor:
        if key != "sem_seg" or "scores" not in self:
            raise KeyError(key)
        return self["scores"].full()


def for_evaluators(model: nn.Module) -> nn.Module:
    """The form of a model that ``inference_on_dataset`` takes, without scores that nobody reads.

    Args:
        model: of any kind, possibly wrapped in ``DistributedDataParallel``.

    Returns:
        The model itself where it gives no scores.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return ForEvaluators(inner) if gives_scores(inner) else model
