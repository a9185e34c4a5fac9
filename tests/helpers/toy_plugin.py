"""A task and a decoder outside the package, for ``--import toy_plugin``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

import tiny
from semask.modeling.heads import SegmentationHead
from semask.modeling.layers.resize import resize
from semask.tasks import TASK_REGISTRY, SemanticTask

FOLDER = os.environ.get("TOY_PLUGIN_IMAGES", "")


@TASK_REGISTRY.register()
class ToyTask(SemanticTask):
    """Semantic segmentation whose report is one line of JSON."""

    name = "toy"

    def write_report(self, model: nn.Module, dataset_name: str, folder: str) -> str:
        """The names of the classes and the number of parameters."""
        path = os.path.join(folder, "toy_report.json")
        names = MetadataCatalog.get(dataset_name).stuff_classes
        size = sum(parameter.numel() for parameter in model.parameters())
        Path(path).write_text(json.dumps({"classes": names, "parameters": size}))
        return path


@SEM_SEG_HEADS_REGISTRY.register()
class ToyHead(SegmentationHead):
    """One 1x1 convolution on the finest features."""

    @configurable
    def __init__(self, *, feature: str, channels: int, num_classes: int) -> None:
        super().__init__()
        self.feature = feature
        self.num_classes = num_classes
        self.layer = nn.Conv2d(channels, num_classes, 1)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        feature = head.IN_FEATURES[0]
        channels = input_shape[feature].channels
        return {"feature": feature, "channels": channels, "num_classes": head.NUM_CLASSES}

    def predict(self, features: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"logits": self.layer(features[self.feature])}

    def losses(
        self, features: Mapping[str, Tensor], targets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        target = targets["sem_seg"]
        size = (target.shape[-2], target.shape[-1])
        logits = resize(self.predict(features)["logits"], size)
        loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=self.ignore_value)
        return {"loss_toy": loss}


if FOLDER:
    records = tiny.write_images(Path(FOLDER), 6)
    tiny.register("toy_train", records[:4])
    tiny.register("toy_val", records[4:])
