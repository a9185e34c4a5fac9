"""Detection and instance segmentation by detectors or mask classification, evaluated by AP."""

import contextlib
import itertools
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from semask.data.annotations import is_usable, list_problems
from semask.data.bands import ImageReader
from semask.data.checks.report import dark_words
from semask.data.checks.semantic import (
    evenly_spaced,
    list_dataset,
    listed_names,
)
from semask.data.mappers.instance import InstanceMapper, uses_large_scale_jitter
from semask.data.reading import is_nearly_black
from semask.data.unreadable import ReadableDataset
from semask.errors import ConfigError, DataError
from semask.evaluation.instance_evaluators import build_instance_evaluator, check_evaluator_type
from semask.inference.instance_predictor import InstancePredictor
from semask.modeling.architecture import (
    classes_section,
    detector_classes,
    has_semantic_head,
    is_mask_classification,
    predicts_masks,
    prior_classes,
    prior_is_supervised,
)
from semask.modeling.heads.prior import PRIOR_TARGET
from semask.report.instances import write_instance_report
from semask.tasks.base import TASK_REGISTRY, InputMapper, Task
from semask.tasks.semantic import check_ignore_value, resolve_semantic_classes

logger = logging.getLogger(__name__)


@TASK_REGISTRY.register()
class InstanceTask(Task):
    """Images with instances; models return "instances", with boxes and usually masks.

    Attributes:
        objects: what the annotations of an image are, for messages.
    """

    name = "instance"
    objects: ClassVar[str] = "annotations"
    predictor = InstancePredictor
    shapes_only = False  # the kept boxes depend on values
    fixed_size = False

    def resolve_classes(self) -> None:
        """As :meth:`Task.resolve_classes`, for the detector and its semantic map.

        The detector's number stays 0 if the dataset cannot be read, so that a config can be loaded
        without its data; code that uses the data raises the error.
        """
        if not is_mask_classification(self.cfg):
            resolve_semantic_classes(self.cfg)
        resolve_detector_classes(self.cfg)
        if is_mask_classification(self.cfg):
            resolve_prior_classes(self.cfg)

    def build_mapper(self, is_train: bool) -> InputMapper:
        """See :class:`InstanceMapper`."""
        return InstanceMapper(self.cfg, is_train=is_train)

    @property
    def filter_empty(self) -> bool:
        """The value of ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``."""
        return self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS

    def check_datasets(self, names: Sequence[str], *, eval_only: bool) -> None:
        """As :meth:`Task.check_datasets`; all datasets need the same categories."""
        if is_mask_classification(self.cfg):
            self._check_predicted("INSTANCE_ON")
        check_same_categories(names)
        if not eval_only:
            self._check_best_metric()
        super().check_datasets(names, eval_only=eval_only)

    def _check_predicted(self, key: str) -> None:
        if not self.cfg.MODEL.MASK_FORMER.TEST[key]:
            raise ConfigError(
                f"TASK is '{self.name}', but MODEL.MASK_FORMER.TEST.{key} is False: set it to True."
            )

    def _check_best_metric(self) -> None:
        metric = self.cfg.TEST.BEST_METRIC
        if metric.startswith("segm/") and not predicts_masks(self.cfg):
            raise ConfigError(
                f"TEST.BEST_METRIC is '{metric}', but this model predicts no masks: set it to "
                "'bbox/AP'."
            )

    def check_metadata(self, name: str) -> None:
        """See :meth:`Task.check_metadata`; evaluated datasets need an evaluator."""
        categories, expected = categories_of(name), detector_classes(self.cfg)
        if len(categories) != expected:
            raise ConfigError(
                f"The numbers of categories differ: dataset '{name}' has {len(categories)}, but "
                f"MODEL.{classes_section(self.cfg)}.NUM_CLASSES is {expected}. Set it to "
                f"{len(categories)}."
            )
        evaluated = name in self.cfg.DATASETS.TEST
        panoptic = evaluated and self.evaluates_panoptic(name)
        if panoptic or not evaluated or name in self.cfg.DATASETS.TRAIN:
            self._check_semantic_map(name)

    def evaluates_panoptic(self, name: str) -> bool:
        """Whether a dataset is also evaluated for panoptic segmentation.

        Raises:
            ConfigError: there is no evaluator for the dataset, or its package is missing.
        """
        check_evaluator_type(name)
        return False

    def _check_semantic_map(self, name: str) -> None:
        """Check a dataset's semantic maps, if they are used, against the heads."""
        head = self.cfg.MODEL.SEM_SEG_HEAD
        supervised = prior_is_supervised(self.cfg)  # which checks MODEL.SEMASK.NUM_CLASSES
        of_prior = is_mask_classification(self.cfg)
        key = "SEMASK" if of_prior else "SEM_SEG_HEAD"
        expected = prior_classes(self.cfg) if of_prior else head.NUM_CLASSES
        from_map = supervised and self.cfg.MODEL.SEMASK.PRIOR_TARGET == "sem_seg"
        if not from_map and not has_semantic_head(self.cfg):
            return
        classes = MetadataCatalog.get(name).get("stuff_classes")
        if not classes:
            raise ConfigError(
                f"Dataset '{name}' has no semantic classes: its metadata need stuff_classes. "
                "Without semantic maps the prior's target is painted from the instances "
                "(MODEL.SEMASK.PRIOR_TARGET 'instances')."
            )
        if len(classes) != expected:
            raise ConfigError(
                f"The numbers of semantic classes differ: dataset '{name}' has {len(classes)}, but "
                f"MODEL.{key}.NUM_CLASSES is {expected}. Set it to {len(classes)}."
            )
        check_ignore_value(self.cfg, name)

    def check_images(self, name: str, *, is_train: bool, resume: bool = False) -> None:
        """As :meth:`Task.check_images`, and check all annotations.

        A warning counts unusable annotations, which training skips. Another warning is logged if an
        evaluated image has more instances than ``TEST.DETECTIONS_PER_IMAGE``.
        """
        mapper, masks = self.build_mapper(is_train), predicts_masks(self.cfg)
        records = list_dataset(name)
        self._warn(name, records, masks=masks)
        if is_train and not _any_usable(records, masks=masks):
            hint = ""
            if masks and _any_outlined(records):
                hint = (
                    " with a mask that can be used: correct the masks, of which the warnings above "
                    "say what is wrong; or, for a detector of boxes, set MODEL.MASK_ON False and "
                    "TEST.BEST_METRIC bbox/AP"
                )
            elif masks and _any_usable(records, masks=False):
                hint = (
                    " with a mask, only boxes: MODEL.MASK_ON False with TEST.BEST_METRIC bbox/AP "
                    "trains a detector of boxes"
                )
            raise DataError(f"Dataset '{name}' has no annotated instance to train on{hint}.")
        limit = self.cfg.DATALOADER.MAX_UNREADABLE if resume else 0
        # With CHECK_SAMPLE 0 one image still passes through the pipeline.
        sample = evenly_spaced(records, max(1, self.cfg.DATASETS.CHECK_SAMPLE))
        dataset = ReadableDataset(sample, mapper, limit)
        for index in range(len(dataset)):
            dataset[index]
        self._warn_of_dark(name, sample)

    def _warn(self, name: str, records: Sequence[dict[str, Any]], *, masks: bool) -> None:
        """Warn about problems that do not prevent a run, but are rarely intended."""
        numbers = [len(record.get("annotations", ())) for record in records]
        counts, examples = list_problems(records, masks=masks)
        for kind, number in counts.most_common():
            logger.warning(
                "Dataset '%s': %s in %d of %d annotations, the first is %s; training skips what "
                "cannot be used, and the evaluation ignores it.",
                name,
                kind,
                number,
                sum(numbers),
                examples[kind],
            )
        if name in self.cfg.DATASETS.TEST and not sum(numbers):
            logger.warning(
                "Dataset '%s' has no annotations: there is nothing to evaluate. Predictions on "
                "images alone can be looked at with `semask predict`.",
                name,
            )
        self._warn_of_queries(name, numbers)
        limit = self.cfg.TEST.DETECTIONS_PER_IMAGE
        if name in self.cfg.DATASETS.TEST and max(numbers) > limit >= 0:
            logger.warning(
                "Dataset '%s': an image has %d annotations, but TEST.DETECTIONS_PER_IMAGE is %d: "
                "set it to more, or those beyond count as missed.",
                name,
                max(numbers),
                limit,
            )

    def _warn_of_queries(self, name: str, numbers: Sequence[int]) -> None:
        """Warn about images with more objects than the model has queries.

        Args:
            name: of the dataset.
            numbers: of instances or segments in each image.
        """
        queries = self.cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
        if is_mask_classification(self.cfg) and max(numbers, default=0) > queries:
            logger.warning(
                "Dataset '%s': an image has %d %s, but the model has %d queries, each of which "
                "finds one: set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES to more, or those beyond are "
                "missed.",
                *(name, max(numbers), self.objects),
                queries,
            )

    def _warn_of_dark(self, name: str, sample: Sequence[dict[str, Any]]) -> None:
        reader, dark = ImageReader.from_config(self.cfg), 0
        for record in sample:
            with contextlib.suppress(DataError):  # of those that may be unreadable
                dark += is_nearly_black(reader.read(record["file_name"]))
        if dark:
            logger.warning("Dataset '%s': %s", name, dark_words(dark, len(sample)))

    def build_evaluator(self, dataset_name: str, folder: str) -> DatasetEvaluator:
        """See :func:`semask.evaluation.instance_evaluators.build_instance_evaluator`."""
        return build_instance_evaluator(
            dataset_name,
            folder,
            masks=predicts_masks(self.cfg),
            panoptic=self.evaluates_panoptic(dataset_name),
            detections_per_image=self.cfg.TEST.DETECTIONS_PER_IMAGE,
            library=self.cfg.TEST.AP_LIBRARY,
            boundary=self.cfg.TEST.BOUNDARY_IOU and predicts_masks(self.cfg),
        )

    def write_report(self, model: nn.Module, dataset_name: str, folder: str) -> str:
        """See :func:`semask.report.instances.write_instance_report`."""
        facts = self._facts(model, self.cfg.MODEL.META_ARCHITECTURE)
        mapper = self.build_mapper(False)
        return write_instance_report(model, dataset_name, mapper, folder, facts=facts)

    def training_size(self) -> tuple[int, int]:
        """The crop of ``INPUT.LSJ``, or the largest MIN_SIZE_TRAIN x MAX_SIZE_TRAIN.

        For mask classification, the square that crops are padded to, or the crop.
        """
        inputs = self.cfg.INPUT
        if uses_large_scale_jitter(self.cfg):
            return int(inputs.LSJ.SIZE[0]), int(inputs.LSJ.SIZE[1])
        if is_mask_classification(self.cfg):
            if inputs.SIZE_DIVISIBILITY > 0:
                return inputs.SIZE_DIVISIBILITY, inputs.SIZE_DIVISIBILITY
            if inputs.CROP.ENABLED and inputs.CROP.TYPE == "absolute":
                return int(inputs.CROP.SIZE[0]), int(inputs.CROP.SIZE[1])
        return max(inputs.MIN_SIZE_TRAIN), inputs.MAX_SIZE_TRAIN

    def placeholder_inputs(self, size: tuple[int, int], count: int) -> list[dict[str, Any]]:
        """Black images with four instances of category 0, one in each quarter."""
        height, width = size
        boxes = torch.tensor(
            [
                [x * width / 2, y * height / 2, (x + 1) * width / 2, (y + 1) * height / 2]
                for y in (0, 1)
                for x in (0, 1)
            ]
        )
        instances = Instances(size, gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
        if predicts_masks(self.cfg):
            masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            instances.gt_masks = BitMasks(masks)
        sample = {
            "image": torch.zeros(len(self.cfg.MODEL.PIXEL_MEAN), *size),
            "height": height,
            "width": width,
            "instances": instances,
            "sem_seg": torch.zeros(size, dtype=torch.int64),
            PRIOR_TARGET: torch.zeros(size, dtype=torch.int64),
        }
        return [dict(sample) for _ in range(count)]

    def analysis_config(self) -> CfgNode:
        """As :meth:`Task.analysis_config`; ``TEST.DETECTIONS_PER_IMAGE`` boxes get masks."""
        cfg = super().analysis_config()
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0  # untrained scores are below the default
        cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 1.0  # the number of overlapping boxes is random
        return cfg


def check_same_categories(names: Sequence[str]) -> None:
    """Check the categories of all datasets of a run against those of the first.

    Args:
        names: of registered datasets.

    Raises:
        ConfigError: the categories differ in names or order, or there are none.
        DataError: a dataset cannot be loaded, which its category names need.
    """
    first = names[0]
    for name in names[1:]:
        pairs = itertools.zip_longest(categories_of(first), categories_of(name), fillvalue="none")
        for index, (known, other) in enumerate(pairs):
            if known != other:
                raise ConfigError(
                    f"The categories differ: number {index} is '{known}' in dataset '{first}' and "
                    f"'{other}' in '{name}'. All datasets of a run need the same categories in the "
                    "same order, in COCO's format the order of their ids; 'categories' may list "
                    "unused ones."
                )


def categories_of(name: str) -> list[str]:
    """Names of the categories of a registered dataset.

    Raises:
        ConfigError: the dataset is not registered, or has no categories.
        DataError: the dataset cannot be loaded, which its categories need.
    """
    categories = listed_names(name, "thing_classes")
    if not categories:
        raise ConfigError(f"Dataset '{name}' has no categories: its metadata need thing_classes.")
    return categories


def resolve_detector_classes(cfg: CfgNode) -> None:
    """Replace 0 as the detector's number of categories by that of the first dataset.

    Args:
        cfg: not frozen.

    Raises:
        ConfigError: there is no dataset to ask.
    """
    key = classes_section(cfg)
    if cfg.MODEL[key].NUM_CLASSES != 0:
        return
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog:
            continue
        if not MetadataCatalog.get(name).get("thing_classes"):
            try:
                DatasetCatalog.get(name)  # which reads the names of the categories
            except DataError:
                return
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes:
            cfg.MODEL[key].NUM_CLASSES = len(classes)
            return
    raise ConfigError(
        f"MODEL.{key}.NUM_CLASSES is 0, that is as many as the dataset has; but neither "
        "DATASETS.TRAIN nor DATASETS.TEST names a registered dataset with categories."
    )


def resolve_prior_classes(cfg: CfgNode) -> None:
    """Replace a ``MODEL.SEMASK.NUM_CLASSES`` of 0 by the prior target's number, in place.

    Backbones use ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` instead, which in mask classification is the
    number of classes of the queries.

    Raises:
        ConfigError: see :func:`prior_classes`.
    """
    if cfg.MODEL.SEMASK.NUM_CLASSES == 0 and cfg.MODEL.SEMASK.PRIOR_TARGET == "sem_seg":
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            if name in DatasetCatalog and MetadataCatalog.get(name).get("stuff_classes"):
                cfg.MODEL.SEMASK.NUM_CLASSES = len(MetadataCatalog.get(name).stuff_classes)
                return
    if detector_classes(cfg) > 0:
        cfg.MODEL.SEMASK.NUM_CLASSES = prior_classes(cfg)


def _any_outlined(records: Sequence[dict[str, Any]]) -> bool:
    """Whether any annotation has a segmentation, usable or not."""
    return any(
        bool(annotation.get("segmentation"))
        for record in records
        for annotation in record.get("annotations", ())
    )


def _any_usable(records: Sequence[dict[str, Any]], *, masks: bool) -> bool:
    return any(
        is_usable(annotation, record, masks=masks)
        for record in records
        for annotation in record.get("annotations", ())
    )
