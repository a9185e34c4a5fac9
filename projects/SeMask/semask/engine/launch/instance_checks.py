"""What can be wrong with a detector's datasets, found before a run."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from semask.data.annotations import is_usable, list_problems
from semask.data.checks.semantic import evenly_spaced, list_dataset, registered_metadata
from semask.data.loading.unreadable import ReadableDataset
from semask.data.mappers.build import build_mapper
from semask.errors import ConfigError, DataError
from semask.evaluation.instance_evaluators import evaluates_panoptic, predicts_masks
from semask.modeling.backbone.detector_fpn import detector_classes
from semask.modeling.meta_arch.detectors import PriorLoss

logger = logging.getLogger(__name__)


def check_same_categories(names: Sequence[str]) -> None:
    """Hold the categories of all datasets of a run against those of the first.

    Args:
        names: of registered datasets.

    Raises:
        ConfigError: they are not the same ones in the same order, or there are none.
        DataError: a dataset has to be listed for the names of its categories, and cannot be.
    """
    first = names[0]
    for name in names[1:]:
        pairs = itertools.zip_longest(_categories(first), _categories(name), fillvalue="none")
        for index, (known, other) in enumerate(pairs):
            if known != other:
                raise ConfigError(
                    f"The categories disagree: number {index} is '{known}' in dataset '{first}' "
                    f"and '{other}' in '{name}'. All datasets of a run need the same ones in the "
                    "same order, in COCO's format that of their ids; 'categories' may list some "
                    "that no annotation has."
                )


def _categories(name: str) -> list[str]:
    metadata = registered_metadata(name)
    if not metadata.get("thing_classes"):
        list_dataset(name)  # which reads the names of the categories
    categories = metadata.get("thing_classes")
    if not categories:
        raise ConfigError(f"Dataset '{name}' has no categories: its metadata need thing_classes.")
    return list(categories)


def check_best_metric(cfg: CfgNode) -> None:
    """Hold ``TEST.BEST_METRIC`` against what the model predicts.

    Raises:
        ConfigError: it is a result of masks, and the model predicts boxes alone.
    """
    if cfg.TEST.BEST_METRIC.startswith("segm/") and not predicts_masks(cfg):
        raise ConfigError(
            f"TEST.BEST_METRIC is '{cfg.TEST.BEST_METRIC}', but this model predicts no masks: set "
            "it to 'bbox/AP'."
        )


def check_instance_metadata(cfg: CfgNode, name: str) -> None:
    """Hold a dataset's name and classes against the config of a detector.

    Raises:
        ConfigError: the dataset is not registered, it has other classes than the model, or it
            cannot be evaluated.
        DataError: it has to be listed for the names of its categories, and cannot be.
    """
    categories = _categories(name)
    expected = detector_classes(cfg)
    if len(categories) != expected:
        key = "RETINANET" if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE else "ROI_HEADS"
        raise ConfigError(
            f"The numbers of categories disagree: dataset '{name}' has {len(categories)}, "
            f"MODEL.{key}.NUM_CLASSES is {expected}. Set it to {len(categories)}."
        )
    # Which refuses what cannot be evaluated.
    panoptic = name in cfg.DATASETS.TEST and evaluates_panoptic(cfg, name)
    if panoptic or name not in cfg.DATASETS.TEST or name in cfg.DATASETS.TRAIN:
        _check_prior_classes(cfg, name)


def _check_prior_classes(cfg: CfgNode, name: str) -> None:
    """The semantic maps, where there are any, against the heads that they supervise."""
    head = cfg.MODEL.SEM_SEG_HEAD
    supervised = PriorLoss.from_config(cfg) is not None  # which checks MODEL.SEMASK.NUM_CLASSES
    from_map = supervised and cfg.MODEL.SEMASK.PRIOR_TARGET == "sem_seg"
    if not from_map and "PanopticFPN" not in cfg.MODEL.META_ARCHITECTURE:
        return
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("stuff_classes")
    if not classes:
        raise ConfigError(
            f"Dataset '{name}' has no semantic classes: its metadata need stuff_classes. Without "
            "semantic maps the prior's target is painted from the instances "
            "(MODEL.SEMASK.PRIOR_TARGET 'instances')."
        )
    if len(classes) != head.NUM_CLASSES:
        raise ConfigError(
            f"The numbers of semantic classes disagree: dataset '{name}' has {len(classes)}, "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES}. Set it to {len(classes)}."
        )
    ignore_value = metadata.get("ignore_label", head.IGNORE_VALUE)
    if ignore_value != head.IGNORE_VALUE:
        raise ConfigError(
            f"Dataset '{name}' ignores the label {ignore_value}, but "
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE}: they have to be the same."
        )


def check_instances(cfg: CfgNode, name: str, *, is_train: bool, resume: bool = False) -> None:
    """List a dataset, look at all its annotations and at a sample of its images.

    Annotations that cannot be used are counted in a warning; training skips them. So is an image
    with more instances than ``TEST.DETECTIONS_PER_IMAGE``, where they are evaluated.

    Args:
        cfg: the whole config.
        name: a registered dataset.
        is_train: it is trained on.
        resume: unreadable files do not keep a run from going on; it will skip them.

    Raises:
        DataError: it is missing or empty, has no annotation that can be trained on, or its images
            or annotations cannot be used.
        ConfigError: the input pipeline cannot be built from the config.
    """
    mapper, masks = build_mapper(cfg, is_train), predicts_masks(cfg)
    records = list_dataset(name)
    _warn(cfg, name, records, masks=masks)
    if is_train and not _any_usable(records, masks=masks):
        hint = ""
        if masks and _any_usable(records, masks=False):
            hint = (
                " with a mask, only boxes: MODEL.MASK_ON False with TEST.BEST_METRIC bbox/AP "
                "trains a detector of boxes"
            )
        raise DataError(f"Dataset '{name}' has no annotated instance to train on{hint}.")
    limit = cfg.DATALOADER.MAX_UNREADABLE if resume else 0
    # With CHECK_SAMPLE 0 one image still goes through the pipeline.
    sample = evenly_spaced(records, max(1, cfg.DATASETS.CHECK_SAMPLE))
    dataset = ReadableDataset(sample, mapper, limit)
    for index in range(len(dataset)):
        dataset[index]


def _any_usable(records: Sequence[dict[str, Any]], *, masks: bool) -> bool:
    return any(
        is_usable(annotation, record, masks=masks)
        for record in records
        for annotation in record.get("annotations", ())
    )


def _warn(cfg: CfgNode, name: str, records: Sequence[dict[str, Any]], *, masks: bool) -> None:
    """Say what a run can go on with, but hardly is what is wanted."""
    numbers = [len(record.get("annotations", ())) for record in records]
    counts, examples = list_problems(records, masks=masks)
    for kind, number in counts.most_common():
        logger.warning(
            "Dataset '%s': %s in %d of %d annotations, the first is %s; training skips what cannot "
            "be used, and in the evaluation it counts neither way.",
            *(name, kind, number, sum(numbers), examples[kind]),
        )
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if name in cfg.DATASETS.TEST and max(numbers) > limit >= 0:
        logger.warning(
            "Dataset '%s': an image has %d annotations, but TEST.DETECTIONS_PER_IMAGE is %d: set "
            "it to more, or those beyond count as missed.",
            *(name, max(numbers), limit),
        )
