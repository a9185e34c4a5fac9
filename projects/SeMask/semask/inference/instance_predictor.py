"""A trained model as a function from an image to its instances and segments."""

import dataclasses
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.data.datasets.coco_folder import category_ids
from semask.errors import ConfigError, DataError
from semask.inference.masks import RunLengthMasks
from semask.inference.model_outputs import (
    FoundInstances,
    class_map,
    gives_priors,
    predict_instances,
    prior_classes_of,
    stuff_classes_of,
)
from semask.inference.prediction import InstancePrediction
from semask.inference.predictor import AnyImage, ImagePredictor, image_pixels
from semask.modeling.architecture import detector_classes, is_mask_classification
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

    def _set_up(self) -> None:
        self.class_names, self.category_ids, self._dataset = _categories(self.cfg)

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


def _categories(cfg: CfgNode) -> tuple[tuple[str, ...], tuple[int, ...], str]:
    """Names and ids of the categories, and their dataset ("" = none)."""
    number = detector_classes(cfg)
    joint = cfg.TASK == "panoptic" and is_mask_classification(cfg)
    key = "stuff_classes" if joint else "thing_classes"
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name not in DatasetCatalog:
            continue
        metadata = MetadataCatalog.get(name)
        if not metadata.get(key):
            try:
                DatasetCatalog.get(name)  # loading it sets the metadata
            except DataError:
                continue
        names = metadata.get(key, ())
        if len(names) == number:
            return tuple(names), tuple(category_ids(metadata, number)), name
    names = tuple(f"category {index}" for index in range(number))
    return names, tuple(range(1, number + 1)), ""
