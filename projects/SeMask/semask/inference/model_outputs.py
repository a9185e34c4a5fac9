"""A model's outputs for single images, for evaluators, predictors and pictures.

Scores are computed on demand; detectors also return their prior maps, if they have any.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semask.inference.masks import Masks, RunLengthMasks
from semask.modeling.backbone.contract import SemSegBackbone
from semask.modeling.heads.base import ScoreKind
from semask.modeling.heads.prior import PriorSupervision
from semask.modeling.mask_decoder.postprocess import QueryMasks
from semask.modeling.meta_arch.detectors import outputs_of
from semask.ops.lazy_scores import LazyScores, lazy
from semask.ops.mask_postprocess import EncodedMasks
from semask.ops.stripes import MapRows, resized

# From a dataset dict, which it may modify, to a model's input.
Mapper = Callable[[dict[str, Any]], dict[str, Any]]


def predicts_scores(model: nn.Module) -> bool:
    """Whether a model has ``predict`` and ``score_kind``, as ``SeMaskSegmentor`` has.

    Its ``predict(inputs, return_priors)`` returns for one image "sem_seg", of the model's
    ``score_kind``, and optionally "prior", logits, each as a (K, H, W) tensor or as
    :class:`LazyScores`, and "priors", tensors {"prior2": (K, h, w), ...}.
    """
    return callable(getattr(model, "predict", None)) and hasattr(model, "score_kind")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; on exit each module's own mode is restored.

    Args:
        model: possibly wrapped in ``DistributedDataParallel``.

    Yields:
        The model, unwrapped.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    modes = [(module, module.training) for module in model.modules()]  # frozen modules may differ
    model.eval()
    try:
        # Not inference_mode: tensors that a model caches must remain usable in training.
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training


def predict(model: nn.Module, inputs: dict[str, Any], priors: bool = True) -> dict[str, Any]:
    """A model's output for one image, with its semantic-prior maps if it has any.

    Args:
        model: called as ``model.predict(inputs, return_priors=...)`` if it ``predicts_scores``;
            else as ``model.inference([inputs], return_priors=True)`` if that exists; else, as a
            stock Detectron2 model, as ``model([inputs])``.
        inputs: what the mapper made of a dataset dict.
        priors: also return the prior maps.

    Returns:
        "sem_seg", :class:`LazyScores`, and optionally "prior", :class:`LazyScores`, and "priors",
        tensors {"prior2": (K, h, w), ...}.
    """
    predictor: Any = model
    kind: ScoreKind = "logits"  # of Detectron2's SemanticSegmentor and PanopticFPN
    if predicts_scores(model):
        output = predictor.predict(inputs, return_priors=priors)
        kind = predictor.score_kind
    else:
        inference = getattr(model, "inference", None)
        # Stock models may have an ``inference`` with other arguments.
        if callable(inference) and "return_priors" in inspect.signature(inference).parameters:
            output = inference([inputs], return_priors=priors)[0]
        else:
            output = model([inputs])[0]
    kinds: dict[str, ScoreKind] = {"sem_seg": kind, "prior": "logits"}
    return {**output, **{key: lazy(output[key], kinds[key]) for key in kinds if key in output}}


def score_kind_of(model: nn.Module) -> ScoreKind:
    """The kind of scores in "sem_seg"; logits if the model has no ``score_kind``."""
    kind: ScoreKind = getattr(model, "score_kind", "logits") if predicts_scores(model) else "logits"
    return kind


def predict_queries(model: nn.Module, inputs: dict[str, Any], top: int) -> QueryMasks | None:
    """The class and mask of a model's highest-scoring queries for one image.

    Args:
        model: called as ``model.predict_queries(inputs, top)`` if it has this method.
        inputs: what the mapper made of a dataset dict.
        top: the maximum number of queries.

    Returns:
        None for models without queries.
    """
    method = getattr(model, "predict_queries", None)
    return method(inputs, top) if callable(method) else None


def class_map(scores: LazyScores | torch.Tensor) -> np.ndarray:
    """The class of highest score: from lazy or (K, H, W) scores to (H, W) classes."""
    labels = scores.labels() if isinstance(scores, LazyScores) else scores.argmax(dim=0)
    return labels.cpu().numpy()


class LazyOutputModel(nn.Module):
    """A model whose scores are computed when an evaluator reads them.

    Its outputs have "scores", :class:`LazyScores`, for evaluators that support them; "sem_seg", all
    scores in one tensor, is computed when it is read.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: one that ``predicts_scores``.
        """
        super().__init__()
        self.model: Any = model
        self.training = model.training

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list["_LazyOutput"]:
        """An output for each image."""
        return [self._output(inputs) for inputs in batched_inputs]

    def _output(self, inputs: dict[str, Any]) -> "_LazyOutput":
        output = predict(self.model, inputs, priors=False)
        if "sem_seg" in output:
            output["scores"] = output.pop("sem_seg")
        return _LazyOutput(output)


class _LazyOutput(dict[str, Any]):
    """A model's output, with "scores", :class:`LazyScores`, and "sem_seg" on demand."""

    def __missing__(self, key: str) -> torch.Tensor:
        if key != "sem_seg" or "scores" not in self:
            raise KeyError(key)
        return self["scores"].full()


def for_evaluators(model: nn.Module) -> nn.Module:
    """Wrap a model for ``inference_on_dataset``, so that only scores that are read are computed.

    Args:
        model: of any kind, possibly wrapped in ``DistributedDataParallel``.

    Returns:
        The wrapped model, or the model itself if not ``predicts_scores``.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return LazyOutputModel(inner) if predicts_scores(inner) else model


def predict_instances(
    model: nn.Module, inputs: dict[str, Any], *, priors: bool = False
) -> dict[str, Any]:
    """The output of an instance or panoptic model for one image.

    Args:
        model: in evaluation mode, not wrapped.
        inputs: what the mapper made of an image.
        priors: also return the semantic priors, if the model has any.

    Returns:
        Detectron2's output: "instances", and for a panoptic model "sem_seg" and "panoptic_seg"; for
        mask classification, those that its config selects, with masks that may be encoded. With
        ``priors`` also "priors", {"prior2": (K, h, w), ...}, without the batch's padding, and, if
        the model's prior is supervised, "prior", the decoded logits as :class:`LazyScores` of the
        original image's size.
    """
    if predicts_scores(model):
        return predict(model, inputs, priors)
    backbone = getattr(model, "backbone", None)
    if not (priors and gives_priors(model) and isinstance(backbone, SemSegBackbone)):
        return model([inputs])[0]
    with prior_maps_of(backbone) as maps:
        output = dict(model([inputs])[0])
    size = (inputs["image"].shape[-2], inputs["image"].shape[-1])
    output["priors"] = without_padding(maps, backbone.prior_strides, size)
    supervision: PriorSupervision | None = getattr(model, "prior_supervision", None)
    if supervision is not None:
        cut = {name: value[None] for name, value in output["priors"].items()}
        decoded = MapRows(supervision.decode(cut, size)[0])
        original = (inputs.get("height", size[0]), inputs.get("width", size[1]))
        output["prior"] = LazyScores(resized(decoded, size, original), "logits")
    return output


class FoundInstances(NamedTuple):
    """Predicted instances of an image of height H and width W, highest score first.

    Attributes:
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels.
        scores: (N,) float32.
        classes: (N,) int64.
        masks: N masks (H, W) bool, in one array or decoded when they are read; None for a detector
            of boxes alone.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: Masks | None

    @classmethod
    def of(cls, instances: Instances, min_score: float = -np.inf) -> "FoundInstances":
        """Detectron2's predictions with at least ``min_score``, as arrays."""
        instances = instances.to(torch.device("cpu"))
        instances = instances[instances.scores >= min_score]
        instances = instances[instances.scores.argsort(descending=True, stable=True)]
        predicted = instances.pred_masks if instances.has("pred_masks") else None
        masks: Masks | None = None
        if isinstance(predicted, EncodedMasks):
            masks = RunLengthMasks(predicted.rles)
        elif predicted is not None:
            masks = predicted.numpy().astype(bool)
        return cls(
            boxes=instances.pred_boxes.tensor.numpy().astype(np.float32),
            scores=instances.scores.numpy().astype(np.float32),
            classes=instances.pred_classes.numpy().astype(np.int64),
            masks=masks,
        )

    @classmethod
    def none(cls) -> "FoundInstances":
        """No instances, for a model that predicts only segments."""
        boxes, scores = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        return cls(boxes, scores, np.zeros(0, np.int64), RunLengthMasks([]))


def gives_priors(model: nn.Module) -> bool:
    """Whether the backbone of a model has semantic layers."""
    backbone = getattr(model, "backbone", None)
    return isinstance(backbone, SemSegBackbone) and backbone.num_semantic_classes > 0


def prior_strides_of(model: nn.Module) -> dict[str, int]:
    """Stride of each prior map of a model's backbone, by name; empty without semantic layers."""
    backbone = getattr(model, "backbone", None)
    return backbone.prior_strides if isinstance(backbone, SemSegBackbone) else {}


@contextlib.contextmanager
def prior_maps_of(backbone: SemSegBackbone) -> Iterator[dict[str, Tensor]]:
    """A dictionary with the prior maps of the forward pass in the ``with`` block.

    Detectron2's detectors call their backbone with the images alone. Within the block it returns
    the priors as well, which the heads ignore, as in training.

    Args:
        backbone: a :class:`SemSegBackbone`.

    Yields:
        After a forward pass: {"prior2": (B, K, h, w), ...}, of the padded batch.
    """

    def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "return_priors": True}

    handle = backbone.register_forward_pre_hook(ask, with_kwargs=True)
    priors: dict[str, Tensor] = {}
    try:
        with outputs_of(backbone) as outputs:
            yield priors
            priors.update({k: outputs[k] for k in backbone.prior_strides if k in outputs})
    finally:
        handle.remove()


def without_padding(
    priors: Mapping[str, Tensor], strides: Mapping[str, int], size: tuple[int, int]
) -> dict[str, Tensor]:
    """The prior maps of one image, without its padding.

    Args:
        priors: {"prior2": (1, K, h, w), ...}.
        strides: of each of them, see :attr:`SemSegBackbone.prior_strides`.
        size: (height, width) of the image that the model was given, in pixels.

    Returns:
        {"prior2": (K, ceil(height / 4), ceil(width / 4)), ...}.
    """
    cut = {}
    for name, maps in priors.items():
        rows, columns = (-(-side // strides[name]) for side in size)
        cut[name] = maps[0, :, :rows, :columns]
    return cut
