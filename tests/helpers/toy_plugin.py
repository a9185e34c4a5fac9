"""A task and a decoder outside the package, for ``--import toy_plugin``."""

import dataclasses
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

import tiny
from semask.data.mappers.semantic import SemSegMapper
from semask.evaluation import SemSegConfusionEvaluator
from semask.inference.prediction import Prediction
from semask.inference.predictor import AnyImage, Predictor
from semask.modeling.heads import PriorSupervision, SegmentationHead
from semask.modeling.layers.resize import resize
from semask.tasks import TASK_REGISTRY, SemanticTask
from semask.visualize.drawing import save_picture

FOLDER = os.environ.get("TOY_PLUGIN_IMAGES", "")


def mark(text: str) -> None:
    """Add a line to ``toy_marks.txt`` of the working folder, for the test to read."""
    with open("toy_marks.txt", "a") as file:
        file.write(f"{text}\n")


class ToyMapper(SemSegMapper):
    """Says for what it has been used."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        mark(f"mapper of {'training' if self.is_train else 'evaluation'}")
        return super().__call__(dataset_dict)

    def transform(self, image: np.ndarray, sem_seg: np.ndarray | None = None) -> dict[str, Any]:
        mark(f"transform of {'training' if self.is_train else 'evaluation'}")
        return super().transform(image, sem_seg)


class ToyEvaluator(SemSegConfusionEvaluator):
    """Adds a metric."""

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        results = super().evaluate()
        if results is not None:
            results["toy"] = {"answer": 42.0}
        return results


class ToyPredictor(Predictor):
    """Predicts the last class everywhere."""

    def __call__(self, image: AnyImage, **options: Any) -> Prediction:
        prediction = super().__call__(image, **options)
        labels = np.full_like(prediction.labels, len(self.class_names) - 1)
        return dataclasses.replace(prediction, labels=labels)


@TASK_REGISTRY.register()
class ToyTask(SemanticTask):
    """Semantic segmentation, of which every part is its own."""

    name = "toy"
    predictor = ToyPredictor

    def build_mapper(self, is_train: bool) -> ToyMapper:
        return ToyMapper(self.cfg, is_train=is_train)

    def check_images(self, name: str, *, is_train: bool, resume: bool = False) -> None:
        mark(f"check of {name}")
        super().check_images(name, is_train=is_train, resume=resume)

    def build_evaluator(self, dataset_name: str, folder: str) -> ToyEvaluator:
        classes = self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        return ToyEvaluator(dataset_name, output_dir=folder, num_classes=classes)

    def write_report(self, model: nn.Module, dataset_name: str, folder: str) -> str:
        """The names of the classes and the number of parameters, as JSON."""
        path = os.path.join(folder, "toy_report.json")
        names = MetadataCatalog.get(dataset_name).stuff_classes
        size = sum(parameter.numel() for parameter in model.parameters())
        Path(path).write_text(json.dumps({"classes": names, "parameters": size}))
        return path

    def panels_path(self) -> str:
        return os.path.join(self.cfg.OUTPUT_DIR, "toy_panels.png")

    def draw_panels(self, model: nn.Module) -> np.ndarray:
        """A grey square."""
        picture = np.full((8, 8, 3), 128, np.uint8)
        save_picture(picture, self.panels_path())
        return picture


@SEM_SEG_HEADS_REGISTRY.register()
class ToyHead(SegmentationHead):
    """One 1x1 convolution on the finest features; the semantic priors are supervised."""

    @configurable
    def __init__(
        self,
        *,
        feature: str,
        channels: int,
        num_classes: int,
        prior_supervision: PriorSupervision | None = None,
    ) -> None:
        super().__init__()
        self.feature = feature
        self.num_classes = num_classes
        self.layer = nn.Conv2d(channels, num_classes, 1)
        self.prior_supervision = prior_supervision

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        feature = head.IN_FEATURES[0]
        return {
            "feature": feature,
            "channels": input_shape[feature].channels,
            "num_classes": head.NUM_CLASSES,
            "prior_supervision": PriorSupervision.from_config(cfg, input_shape, head.NUM_CLASSES),
        }

    def predict(self, features: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"logits": self.layer(features[self.feature])}

    def losses(
        self, features: Mapping[str, Tensor], targets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        target = targets["sem_seg"]
        size = (target.shape[-2], target.shape[-1])
        logits = resize(self.predict(features)["logits"], size)
        loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=self.ignore_value)
        return {"loss_toy": loss, **self.prior_losses(features, targets)}


if FOLDER:
    records = tiny.write_images(Path(FOLDER), 6)
    tiny.register("toy_train", records[:4])
    tiny.register("toy_val", records[4:])
