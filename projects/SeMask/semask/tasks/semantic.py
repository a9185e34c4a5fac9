"""Semantic segmentation: a class for each pixel, evaluated by mIoU."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from torch import nn

from semask.data.checks.semantic import quick_check, registered_metadata
from semask.data.mappers.semantic import SemSegMapper, build_semantic_mapper
from semask.data.unreadable import ReadableDataset
from semask.errors import ConfigError
from semask.evaluation.boundary import BoundaryIoU
from semask.evaluation.metric import Metric
from semask.evaluation.prediction_files import PredictionFiles
from semask.evaluation.sem_seg_evaluator import SemSegConfusionEvaluator
from semask.inference.predictor import Predictor
from semask.modeling.backbone.contract import has_semantic_layer
from semask.report.panels import render_panels
from semask.report.semantic import report_metrics, write_report
from semask.tasks.base import TASK_REGISTRY, Task
from semask.utils.palette import class_colors
from semask.visualize.drawing import save_picture

logger = logging.getLogger(__name__)


@TASK_REGISTRY.register()
class SemanticTask(Task):
    """Images with label maps; models return "sem_seg", the scores of each class at each pixel."""

    name = "semantic"
    predictor = Predictor

    def resolve_classes(self) -> None:
        """As :meth:`Task.resolve_classes`; the key is ``MODEL.SEM_SEG_HEAD.NUM_CLASSES``.

        Raises:
            ConfigError: no dataset is registered, or the priors have another number of classes.
        """
        resolve_semantic_classes(self.cfg)
        classes, given = self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, self.cfg.MODEL.SEMASK.NUM_CLASSES
        if given not in (0, classes) and self._supervises_priors():
            raise ConfigError(
                f"MODEL.SEMASK.NUM_CLASSES is {given}, but the model has {classes} classes "
                "(MODEL.SEM_SEG_HEAD.NUM_CLASSES). Set it to 0 to follow."
            )

    def _supervises_priors(self) -> bool:
        semask, head = self.cfg.MODEL.SEMASK, self.cfg.MODEL.SEM_SEG_HEAD
        stages = zip(semask.ATTENTION, semask.NUM_BLOCKS, strict=False)
        return head.PRIOR_LOSS_WEIGHT > 0 and any(has_semantic_layer(*stage) for stage in stages)

    def build_mapper(self, is_train: bool) -> SemSegMapper:
        """The mapper of the key ``INPUT.DATASET_MAPPER_NAME``."""
        return build_semantic_mapper(self.cfg, is_train)

    def check_datasets(self, names: Sequence[str], *, eval_only: bool) -> None:
        """As :meth:`Task.check_datasets`; an index must mean the same class in all datasets."""
        super().check_datasets(names, eval_only=eval_only)
        first = registered_metadata(names[0]).stuff_classes
        for name in names[1:]:
            classes = registered_metadata(name).stuff_classes
            pairs = enumerate(zip(first, classes, strict=True))
            differing = [(index, *pair) for index, pair in pairs if pair[0] != pair[1]]
            if not differing:
                continue
            index, known, other = differing[0]
            words = (
                f"The classes differ: number {index} is '{known}' in dataset '{names[0]}' and "
                f"'{other}' in '{name}'."
            )
            if sorted(first) == sorted(classes):
                raise ConfigError(
                    f"{words} All datasets of a run need the same classes in the same order."
                )
            logger.warning("%s Check that they mean the same.", words)

    def check_metadata(self, name: str) -> None:
        """See :meth:`Task.check_metadata`."""
        head = self.cfg.MODEL.SEM_SEG_HEAD
        metadata = registered_metadata(name)
        classes = metadata.get("stuff_classes", None)
        if not classes:
            raise ConfigError(
                f"Dataset '{name}' has no class names: its metadata need stuff_classes."
            )
        in_backbone = self.cfg.MODEL.SEMASK.NUM_CLASSES or head.NUM_CLASSES
        if not len(classes) == head.NUM_CLASSES == in_backbone:
            raise ConfigError(
                f"The numbers of classes differ: dataset '{name}' has {len(classes)}, "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES} and "
                f"MODEL.SEMASK.NUM_CLASSES is {self.cfg.MODEL.SEMASK.NUM_CLASSES} (0 = as the "
                f"head). Set the head's to {len(classes)} and leave the other at 0."
            )
        check_ignore_value(self.cfg, name)

    def check_images(self, name: str, *, is_train: bool, resume: bool = False) -> None:
        """See :meth:`Task.check_images`; the first image goes through the whole pipeline."""
        mapper = self.build_mapper(is_train)
        head = self.cfg.MODEL.SEM_SEG_HEAD
        limit = self.cfg.DATALOADER.MAX_UNREADABLE if resume else 0
        sample = self.cfg.DATASETS.CHECK_SAMPLE
        records = quick_check(
            name,
            head.NUM_CLASSES,
            head.IGNORE_VALUE,
            sample,
            is_train=is_train,
            max_unreadable=limit,
            reader=mapper.reader,
        )
        ReadableDataset(records[: limit + 1], mapper, limit)[0]

    def build_evaluator(self, dataset_name: str, folder: str) -> DatasetEvaluator:
        """mIoU and related metrics, and the additional ones enabled in ``cfg.TEST``."""
        metadata = MetadataCatalog.get(dataset_name)
        names = metadata.get("stuff_classes", [])
        metrics: list[Metric] = []
        if self.cfg.TEST.BOUNDARY_IOU:
            metrics.append(BoundaryIoU(names))
        if self.cfg.TEST.SAVE_PREDICTIONS:
            colors = class_colors(len(names), metadata.get("stuff_colors"))
            metrics.append(
                PredictionFiles(dataset_name, os.path.join(folder, "predictions"), colors)
            )
        if self.cfg.TEST.REPORT:
            metrics += report_metrics()
        return SemSegConfusionEvaluator(
            dataset_name,
            output_dir=folder,
            num_classes=self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            metrics=metrics,
        )

    def write_report(self, model: nn.Module, dataset_name: str, folder: str) -> str:
        """See :func:`semask.report.semantic.write_report`."""
        cfg = self.cfg
        facts = self._facts(model, f"{cfg.MODEL.BACKBONE.NAME} + {cfg.MODEL.SEM_SEG_HEAD.NAME}")
        facts.append(("Test protocol", cfg.TEST.PROTOCOL.replace("_", " ")))
        return write_report(model, dataset_name, self.build_mapper(False), folder, facts=facts)

    def panels_path(self) -> str | None:
        """None if ``TEST.NUM_PANELS`` is 0 or nothing is evaluated."""
        if self.cfg.TEST.NUM_PANELS < 1 or not self.cfg.DATASETS.TEST:
            return None
        return os.path.join(self.cfg.OUTPUT_DIR, "panels.png")

    def draw_panels(self, model: nn.Module) -> np.ndarray | None:
        """See :meth:`Task.draw_panels`; the images are from the first of ``DATASETS.TEST``."""
        path = self.panels_path()
        if path is None:
            return None
        name, number = self.cfg.DATASETS.TEST[0], self.cfg.TEST.NUM_PANELS
        picture = render_panels(model, name, self.build_mapper(False), number)
        save_picture(picture, path)
        return picture

    def training_size(self) -> tuple[int, int]:
        """The crop; without one, a square of the shorter side of ``INPUT.SCALE``."""
        crop = self.cfg.INPUT.CROP
        if crop.ENABLED:
            return int(crop.SIZE[0]), int(crop.SIZE[1])
        side = min(self.cfg.INPUT.SCALE)
        return side, side

    def placeholder_inputs(self, size: tuple[int, int], count: int) -> list[dict[str, Any]]:
        """Black images of class 0; for mask classification, with one mask."""
        channels = len(self.cfg.MODEL.PIXEL_MEAN)
        image, label = torch.zeros(channels, *size), torch.zeros(size, dtype=torch.int64)
        sample = {"image": image, "sem_seg": label, "height": size[0], "width": size[1]}
        instances = Instances(size)  # masks are made here: their number does not follow from shapes
        instances.gt_classes = torch.zeros(1, dtype=torch.int64)
        instances.gt_masks = torch.ones(1, *size, dtype=torch.bool)
        sample["instances"] = instances
        return [dict(sample) for _ in range(count)]


def resolve_semantic_classes(cfg: CfgNode) -> None:
    """Replace a ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` of 0 by the first dataset's number of classes.

    Raises:
        ConfigError: no dataset is registered.
    """
    if cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES != 0:
        return
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name in DatasetCatalog and MetadataCatalog.get(name).get("stuff_classes"):
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(MetadataCatalog.get(name).stuff_classes)
            return
    raise ConfigError(
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 0, that is as many as the dataset has; but neither "
        "DATASETS.TRAIN nor DATASETS.TEST names a registered dataset with class names."
    )


def check_ignore_value(cfg: CfgNode, name: str) -> None:
    """Check a dataset's ignore value against ``MODEL.SEM_SEG_HEAD.IGNORE_VALUE``.

    Raises:
        ConfigError: they differ.
    """
    expected = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    ignore_value = MetadataCatalog.get(name).get("ignore_label", expected)
    if ignore_value != expected:
        raise ConfigError(
            f"Dataset '{name}' ignores the label {ignore_value}, but "
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {expected}: set both to the same value."
        )
