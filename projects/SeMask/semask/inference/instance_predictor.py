"""A trained model as a function from an image to its instances and segments."""

import dataclasses
from typing import Any

import numpy as np
import torch

from semask.errors import ConfigError
from semask.inference.class_names import categories, prior_classes_of, stuff_classes_of
from semask.inference.masks import RunLengthMasks
from semask.inference.model_outputs import (
    FoundInstances,
    class_map,
    gives_priors,
    predict_instances,
)
from semask.inference.prediction import InstancePrediction
from semask.inference.predictor import AnyImage, ImagePredictor, image_pixels, predictor_of
from semask.utils.precision import evaluation_autocast


class InstancePredictor(ImagePredictor):
    """Predicts instances and segments exactly as the evaluation does: same resizing, same numbers.

    Example::

        predictor = semask.InstancePredictor("nuclei/semask_mask_rcnn", "model_final.pth")
        prediction = predictor("cells.png")
        prediction.boxes, prediction.scores, prediction.masks, prediction.overlay()

    Attributes:
        cfg: the config, frozen.
        model: in evaluation mode.
        class_names: of the first dataset of ``DATASETS.TEST`` (or else of ``DATASETS.TRAIN``)
            that is registered with that number of categories; otherwise "category 0", ... For
            panoptic mask classification they are things and stuff.
        category_ids: their ids in that dataset's annotation file; otherwise 1, 2, ...
    """

    def set_up(self) -> None:
        key = predictor_of(self.cfg.TASK).names_key(self.cfg)
        self.class_names, self.category_ids, self._dataset = categories(self.cfg, key)

    @property
    def has_priors(self) -> bool:
        """Whether the model has semantic layers, and therefore prior maps."""
        return gives_priors(self.model)

    def __call__(self, image: AnyImage, *, priors: bool = False) -> InstancePrediction:
        """Predict the instances of one image.

        Args:
            image: a path, a Pillow image, or an (H, W, 3) uint8 RGB array.
            priors: also return the semantic priors.

        Raises:
            DataError: the image cannot be read.
            ConfigError: the model has no semantic priors.
        """
        if priors and not self.has_priors:
            raise ConfigError(
                "This model has no semantic priors to return: its backbone has no semantic layers "
                "(MODEL.BACKBONE.NAME, MODEL.SEMASK.ATTENTION)."
            )
        reader = self._mapper.reader
        pixels = image_pixels(image, reader)
        with torch.inference_mode(), evaluation_autocast(self.cfg):
            output = predict_instances(self.model, self._mapper.transform(pixels), priors=priors)
        if "instances" in output:
            found = FoundInstances.of(output["instances"])
        else:
            found = FoundInstances.none()
        return InstancePrediction(
            image=reader.picture(pixels),
            boxes=found.boxes,
            scores=found.scores,
            classes=found.classes,
            each_mask=found.masks,
            class_names=self.class_names,
            category_ids=self.category_ids,
            **self._panoptic(output),
            **self._priors(output),
        )

    def in_detail(self, image: AnyImage) -> InstancePrediction:
        """See :meth:`ImagePredictor.in_detail`; the masks take little memory."""
        prediction = self(image, priors=self.has_priors)
        if prediction.each_mask is None:
            return prediction
        encoded = RunLengthMasks.encoding(prediction.each_mask)
        return dataclasses.replace(prediction, each_mask=encoded)

    def _panoptic(self, output: dict[str, Any]) -> dict[str, Any]:
        if "panoptic_seg" not in output:
            return {}
        segments, descriptions = output["panoptic_seg"]
        names, colors = stuff_classes_of(self._dataset, self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        return {
            "panoptic": segments.cpu().numpy().astype(np.int32),
            "segments": tuple(dict(entry) for entry in descriptions),
            "stuff_names": tuple(names),
            "stuff_colors": colors,
        }

    def _priors(self, output: dict[str, Any]) -> dict[str, Any]:
        if "priors" not in output:
            return {}
        classes = next(iter(output["priors"].values())).shape[0]
        names, colors = prior_classes_of(self._dataset, classes)
        decoded = output.get("prior")
        return {
            "priors": {k: v.float().cpu().numpy() for k, v in output["priors"].items()},
            "prior": None if decoded is None else class_map(decoded),
            "prior_names": tuple(names),
            "prior_colors": colors,
        }
