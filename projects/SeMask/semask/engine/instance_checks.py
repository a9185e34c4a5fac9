"""What can be wrong with a detector's datasets, found before a run."""

import logging

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from semask.config import ConfigError
from semask.data.annotations import list_problems
from semask.data.build import build_mapper
from semask.data.check import evenly_spaced, list_dataset, registered_metadata
from semask.data.reading import DataError
from semask.data.unreadable import ReadableDataset
from semask.evaluation.instance_evaluators import evaluates_panoptic
from semask.modeling.backbone.semask_fpn import detector_classes
from semask.modeling.prior_supervision import PriorLoss

logger = logging.getLogger(__name__)


def check_instance_metadata(cfg: CfgNode, name: str) -> None:
    """Hold a dataset's name and classes against the config of a detector.

    Raises:
        ConfigError: the dataset is not registered, it has other classes than the model, or it
            cannot be evaluated.
        DataError: it has to be listed for the names of its categories, and cannot be.
    """
    metadata = registered_metadata(name)
    if not metadata.get("thing_classes"):
        list_dataset(name)  # which reads the names of the categories
    categories = metadata.get("thing_classes")
    if not categories:
        raise ConfigError(f"Dataset '{name}' has no categories: its metadata need thing_classes.")
    expected = detector_classes(cfg)
    if len(categories) != expected:
        key = "RETINANET" if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE else "ROI_HEADS"
        raise ConfigError(
            f"The numbers of categories disagree: dataset '{name}' has {len(categories)}, "
            f"MODEL.{key}.NUM_CLASSES is {expected}. Set it to {len(categories)}."
        )
    _check_prior_classes(cfg, name)
    if name in cfg.DATASETS.TEST:
        evaluates_panoptic(cfg, name)  # which refuses what cannot be evaluated


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

    Annotations that cannot be used are counted in a warning; training skips them.

    Args:
        cfg: the whole config.
        name: a registered dataset.
        is_train: it is trained on.
        resume: unreadable files do not keep a run from going on; it will skip them.

    Raises:
        DataError: it is missing or empty, has no annotation to train on, or its images or
            annotations cannot be used.
        ConfigError: the input pipeline cannot be built from the config.
    """
    mapper = build_mapper(cfg, is_train)
    records = list_dataset(name)
    total = sum(len(record.get("annotations", ())) for record in records)
    counts, examples = list_problems(records)
    for kind, number in counts.most_common():
        logger.warning(
            "Dataset '%s': %d of %d annotations have a %s, the first is %s; training skips what "
            "cannot be used.",
            *(name, number, total, kind, examples[kind]),
        )
    usable = any(
        not annotation.get("iscrowd", 0)
        for record in records
        for annotation in record.get("annotations", ())
    )
    if is_train and not usable:
        raise DataError(f"Dataset '{name}' has no annotated instance to train on.")
    limit = cfg.DATALOADER.MAX_UNREADABLE if resume else 0
    # With CHECK_SAMPLE 0 one image still goes through the pipeline.
    sample = evenly_spaced(records, max(1, cfg.DATASETS.CHECK_SAMPLE))
    dataset = ReadableDataset(sample, mapper, limit)
    for index in range(len(dataset)):
        dataset[index]
