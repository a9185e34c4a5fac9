"""Panoptic segmentation by Panoptic FPN or by mask classification, evaluated by PQ, AP and mIoU."""

import contextlib
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from torch import nn

from semask.data.checks.semantic import evenly_spaced, list_dataset, listed_names
from semask.data.mappers.panoptic import PanopticMapper
from semask.data.segments import read_segment_ids, translated
from semask.data.unreadable import ReadableDataset
from semask.errors import ConfigError, DataError
from semask.evaluation.instance_evaluators import InstanceEvaluator, check_evaluator_type
from semask.evaluation.panoptic_evaluator import PanopticEvaluator
from semask.evaluation.sem_seg_evaluator import SemSegConfusionEvaluator
from semask.modeling.architecture import (
    has_semantic_head,
    is_mask_classification,
    prior_classes,
    prior_is_supervised,
)
from semask.report.panoptic import write_panoptic_report
from semask.tasks.base import TASK_REGISTRY, InputMapper
from semask.tasks.instance import InstanceTask, resolve_prior_classes
from semask.tasks.semantic import check_ignore_value
from semask.utils.text import pluralize


@TASK_REGISTRY.register()
class PanopticTask(InstanceTask):
    """Images with segments of things and stuff; models return "panoptic_seg".

    Panoptic FPN indexes things and stuff separately. Mask classification has one list, the
    metadata's ``stuff_classes``, in which ``thing_dataset_id_to_contiguous_id`` marks the things
    (Detectron2's "standard" form of COCO's panoptic datasets).
    """

    name = "panoptic"
    objects = "segments"

    @classmethod
    def category_names_key(cls, cfg: CfgNode) -> str:
        """As :meth:`Task.category_names_key`; of mask classification, things and stuff."""
        if is_mask_classification(cfg):
            return "stuff_classes"
        return super().category_names_key(cfg)

    def resolve_classes(self) -> None:
        """As :meth:`InstanceTask.resolve_classes`; for mask classification, all classes."""
        if not is_mask_classification(self.cfg):
            super().resolve_classes()
            return
        if self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 0:
            self._resolve_segment_classes()
        resolve_prior_classes(self.cfg)

    def _resolve_segment_classes(self) -> None:
        names = [*self.cfg.DATASETS.TRAIN, *self.cfg.DATASETS.TEST]
        for name in names:
            if name not in DatasetCatalog:
                continue
            with contextlib.suppress(DataError):  # raised when the data are used
                self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(segment_classes(name))
            return
        raise ConfigError(
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 0, that is as many as the dataset has; but neither "
            "DATASETS.TRAIN nor DATASETS.TEST names a registered dataset."
        )

    def build_mapper(self, is_train: bool) -> InputMapper:
        """See :class:`PanopticMapper`; for Panoptic FPN, :class:`InstanceMapper`."""
        if is_mask_classification(self.cfg):
            return PanopticMapper(self.cfg, is_train=is_train)
        return super().build_mapper(is_train)

    def check_datasets(self, names: Sequence[str], *, eval_only: bool) -> None:
        """As :meth:`InstanceTask.check_datasets`; the model must predict segments."""
        if not is_mask_classification(self.cfg):
            if not has_semantic_head(self.cfg):
                raise ConfigError(
                    "TASK is 'panoptic', but MODEL.META_ARCHITECTURE "
                    f"'{self.cfg.MODEL.META_ARCHITECTURE}' predicts only instances: set TASK to "
                    "'instance', or the architecture to 'SeMaskPanopticFPN' or 'SeMaskMaskFormer'."
                )
            super().check_datasets(names, eval_only=eval_only)
            return
        self._check_predicted("PANOPTIC_ON")
        first = segment_classes(names[0])
        for name in names[1:]:
            if segment_classes(name) != first:
                raise ConfigError(
                    f"The classes of the datasets '{names[0]}' and '{name}' differ in names or "
                    "order; all datasets of a run need the same."
                )
        for name in names:
            self.check_metadata(name)

    def check_metadata(self, name: str) -> None:
        """See :meth:`Task.check_metadata`."""
        if not is_mask_classification(self.cfg):
            super().check_metadata(name)
            return
        classes, expected = segment_classes(name), self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if len(classes) != expected:
            raise ConfigError(
                f"The numbers of classes differ: dataset '{name}' has {len(classes)} of things "
                f"and stuff, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is {expected}. Set it to "
                f"{len(classes)}."
            )
        supervised = prior_is_supervised(self.cfg)
        if supervised and self.cfg.MODEL.SEMASK.PRIOR_TARGET == "sem_seg":
            if prior_classes(self.cfg) != len(classes):
                raise ConfigError(
                    f"MODEL.SEMASK.NUM_CLASSES is {prior_classes(self.cfg)}, but the semantic maps "
                    f"of dataset '{name}' have {len(classes)} classes: set it to 0 to follow."
                )
            check_ignore_value(self.cfg, name)
        if name in self.cfg.DATASETS.TEST and not self.evaluates_panoptic(name):
            raise ConfigError(
                f"Dataset '{name}' has no panoptic maps to evaluate with: its metadata need "
                "panoptic_json, panoptic_root and an evaluator_type such as 'coco_panoptic_seg'."
            )

    def check_images(self, name: str, *, is_train: bool, resume: bool = False) -> None:
        """As :meth:`Task.check_images`."""
        if not is_mask_classification(self.cfg):
            super().check_images(name, is_train=is_train, resume=resume)
            return
        mapper, records = self.build_mapper(is_train), list_dataset(name)
        self._warn_of_queries(name, [len(record.get("segments_info", ())) for record in records])
        if is_train and not any(record.get("segments_info") for record in records):
            raise DataError(
                f"Dataset '{name}' has no segment to train on: its dicts need "
                "'pan_seg_file_name' and 'segments_info'."
            )
        limit = self.cfg.DATALOADER.MAX_UNREADABLE if resume else 0
        sample = evenly_spaced(records, max(1, self.cfg.DATASETS.CHECK_SAMPLE))
        dataset = ReadableDataset(sample, mapper, limit)
        for index in range(len(dataset)):
            dataset[index]
        listed = [record for record in sample if record.get("segments_info")]
        if is_train and listed and not any(map(_has_a_segment, listed)):
            raise DataError(
                f"The maps of dataset '{name}' have no pixel of the segments in its JSON file, in "
                f"{pluralize(len(listed), 'image')} checked: they must be the maps of this file, "
                "with ids as colours (R + 256 G + 65536 B). `semask check` reports more."
            )
        self._warn_of_dark(name, sample)

    def evaluates_panoptic(self, name: str) -> bool:
        """Whether a dataset has panoptic maps; on others only instances are evaluated."""
        return check_evaluator_type(name)

    def build_evaluator(self, dataset_name: str, folder: str) -> DatasetEvaluator:
        """PQ, and if predicted, AP of the things and mIoU of all classes."""
        if not is_mask_classification(self.cfg):
            return super().build_evaluator(dataset_name, folder)
        test = self.cfg.MODEL.MASK_FORMER.TEST
        evaluators: list[DatasetEvaluator] = [PanopticEvaluator(dataset_name, folder)]
        if test.INSTANCE_ON:
            evaluators.append(
                InstanceEvaluator(
                    dataset_name,
                    folder,
                    masks=True,
                    detections_per_image=self.cfg.TEST.DETECTIONS_PER_IMAGE,
                    library=self.cfg.TEST.AP_LIBRARY,
                    boundary=self.cfg.TEST.BOUNDARY_IOU,
                )
            )
        if test.SEMANTIC_ON:
            classes = self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            evaluators.append(
                SemSegConfusionEvaluator(dataset_name, output_dir=folder, num_classes=classes)
            )
        return DatasetEvaluators(evaluators)

    def write_report(self, model: nn.Module, dataset_name: str, folder: str) -> str:
        """See :func:`semask.report.panoptic.write_panoptic_report`."""
        if not self.evaluates_panoptic(dataset_name):
            return super().write_report(model, dataset_name, folder)
        facts = self._facts(model, self.cfg.MODEL.META_ARCHITECTURE)
        mapper = self.build_mapper(False)
        return write_panoptic_report(model, dataset_name, mapper, folder, facts=facts)


def _has_a_segment(record: dict[str, Any]) -> bool:
    """Whether the map of a dataset dict has a pixel of any of its segments; True if unreadable."""
    with contextlib.suppress(DataError):
        _, found = translated(read_segment_ids(record["pan_seg_file_name"]), {}, 0)
        return any(segment["id"] in found for segment in record["segments_info"])
    return True


def segment_classes(name: str) -> list[str]:
    """Names of all classes, things and stuff, of a registered panoptic dataset.

    Raises:
        ConfigError: the dataset is not registered, or has no classes.
        DataError: the dataset cannot be loaded, which its classes need.
    """
    classes = listed_names(name, "stuff_classes")
    if not classes:
        raise ConfigError(
            f"Dataset '{name}' has no classes: its metadata need stuff_classes, with the names of "
            "things and stuff."
        )
    return classes
