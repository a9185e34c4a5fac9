"""Running a detector on single images, with its prior maps where it has them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from torch import nn

from semask.modeling.backbone.base import SemSegBackbone
from semask.modeling.heads.prior import PriorSupervision
from semask.modeling.meta_arch.prior_maps import gives_priors, prior_maps_of, without_padding
from semask.ops.lazy_scores import LazyScores
from semask.ops.stripes import MapRows, resized
from semask.utils.palette import class_colors

BACKGROUND_COLOR = (225, 225, 225)


def predict_instances(
    model: nn.Module, inputs: dict[str, Any], *, priors: bool = False
) -> dict[str, Any]:
    """A detector's answer for one image.

    Args:
        model: in evaluation mode, not wrapped.
        inputs: what the mapper made of an image.
        priors: with the semantic priors, where the model has them.

    Returns:
        Detectron2's output: "instances", and of a panoptic model "sem_seg" and "panoptic_seg";
        with ``priors`` also "priors", {"prior2": (K, h, w), ...}, without the batch's padding,
        and, of a model whose prior is supervised, "prior", the decoded logits as
        :class:`LazyScores` of the original image's size.
    """
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


def prior_classes_of(dataset_name: str, num_classes: int) -> tuple[list[str], np.ndarray]:
    """Names and colours of the classes of a detector's prior maps.

    Args:
        dataset_name: a registered dataset.
        num_classes: K of the maps.

    Returns:
        K names, and (K, 3) uint8 RGB: those of the dataset's categories and the background, or of
        its semantic classes, if there are as many; else "class 0", ...
    """
    metadata = MetadataCatalog.get(dataset_name)
    things = list(metadata.get("thing_classes", ()))
    if len(things) + 1 == num_classes:
        colors = category_colors(metadata, len(things))
        return [*things, "background"], np.concatenate([colors, [BACKGROUND_COLOR]]).astype(
            np.uint8
        )
    return stuff_classes_of(dataset_name, num_classes)


def stuff_classes_of(dataset_name: str, num_classes: int) -> tuple[list[str], np.ndarray]:
    """Names and colours of the classes of a dataset's semantic maps.

    Args:
        dataset_name: a registered dataset.
        num_classes: K of the model.

    Returns:
        K names, and (K, 3) uint8 RGB: the dataset's, if it has as many; else "class 0", ...
    """
    metadata = MetadataCatalog.get(dataset_name)
    names = list(metadata.get("stuff_classes", ()))
    if len(names) == num_classes:
        return names, class_colors(num_classes, metadata.get("stuff_colors"))
    return [f"class {index}" for index in range(num_classes)], class_colors(num_classes)


def category_colors(metadata: Any, number: int) -> np.ndarray:
    """(N, 3) uint8, RGB: the dataset's thing_colors, or a fixed series where it has none."""
    colors = metadata.get("thing_colors")
    return class_colors(number, colors if colors and len(colors) == number else None)


class FoundInstances(NamedTuple):
    """Predicted instances of an image of height H and width W, the most certain first.

    Attributes:
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels.
        scores: (N,) float32.
        classes: (N,) int64.
        masks: (N, H, W) bool, or None where there are none.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray | None

    @classmethod
    def of(cls, instances: Instances) -> "FoundInstances":
        """Detectron2's predictions as arrays."""
        instances = instances.to(torch.device("cpu"))
        instances = instances[instances.scores.argsort(descending=True, stable=True)]
        masks = instances.pred_masks.numpy().astype(bool) if instances.has("pred_masks") else None
        return cls(
            boxes=instances.pred_boxes.tensor.numpy().astype(np.float32),
            scores=instances.scores.numpy().astype(np.float32),
            classes=instances.pred_classes.numpy().astype(np.int64),
            masks=masks,
        )

    def above(self, score: float) -> "FoundInstances":
        """Those with at least this score."""
        kept = self.scores >= score
        masks = None if self.masks is None else self.masks[kept]
        return FoundInstances(self.boxes[kept], self.scores[kept], self.classes[kept], masks)
