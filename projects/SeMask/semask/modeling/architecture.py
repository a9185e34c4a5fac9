"""What a config says about the model that it describes, before the model is built."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN, RetinaNet

from semask.errors import ConfigError
from semask.modeling.backbone.contract import has_semantic_layer, stage_name

# Targets of the priors of a detector (MODEL.SEMASK.PRIOR_TARGET).
PRIOR_TARGETS = ("instances", "sem_seg")


def classes_section(cfg: CfgNode) -> str:
    """The section of ``MODEL`` that has the NUM_CLASSES of a model of instances.

    "RETINANET" or "ROI_HEADS" of detectors, "SEM_SEG_HEAD" of mask classification.
    """
    if is_mask_classification(cfg):
        return "SEM_SEG_HEAD"
    return "RETINANET" if issubclass(_architecture(cfg), RetinaNet) else "ROI_HEADS"


def detector_classes(cfg: CfgNode) -> int:
    """Number of categories of a model, without the background or "no object"."""
    number: int = cfg.MODEL[classes_section(cfg)].NUM_CLASSES
    return number


def predicts_masks(cfg: CfgNode) -> bool:
    """Whether the model predicts masks, not only boxes."""
    if is_mask_classification(cfg):
        return True
    return cfg.MODEL.MASK_ON and not issubclass(_architecture(cfg), RetinaNet)


def is_mask_classification(cfg: CfgNode) -> bool:
    """Whether the model predicts masks with a class each, of things and stuff alike.

    Its classes are then one series; Panoptic FPN counts things and stuff separately.
    """
    answer: bool = getattr(_architecture(cfg), "classifies_masks", False)
    return answer


def has_semantic_head(cfg: CfgNode) -> bool:
    """Whether the detector also predicts a semantic map, for panoptic segmentation."""
    return issubclass(_architecture(cfg), PanopticFPN)


def _architecture(cfg: CfgNode) -> type:
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        raise ConfigError(f"MODEL.META_ARCHITECTURE is '{name}'; there is no such architecture.")
    return META_ARCH_REGISTRY.get(name)


def prior_classes(cfg: CfgNode) -> int:
    """Classes K of the prior maps of a model of instances: those of the prior's target.

    ``MODEL.SEMASK.NUM_CLASSES``, and where that is 0: with ``MODEL.SEMASK.PRIOR_TARGET``
    "instances" the model's categories and one for the background, with
    "sem_seg" ``MODEL.SEM_SEG_HEAD.NUM_CLASSES``. In mask classification the task sets the number
    (:meth:`semask.tasks.InstanceTask.resolve_classes`).

    Raises:
        ConfigError: the target is unknown, or the number does not fit it.
    """
    target = cfg.MODEL.SEMASK.PRIOR_TARGET
    if target not in PRIOR_TARGETS:
        raise ConfigError(
            f"MODEL.SEMASK.PRIOR_TARGET is '{target}'; set it to {' or '.join(PRIOR_TARGETS)}."
        )
    if target == "sem_seg" and is_mask_classification(cfg):
        # The classes of the label maps need not be those of the queries.
        return cfg.MODEL.SEMASK.NUM_CLASSES or cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if target == "instances":
        needed, key = detector_classes(cfg) + 1, "the categories and one for the background"
    else:
        needed, key = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
    given = cfg.MODEL.SEMASK.NUM_CLASSES
    if given not in (0, needed):
        raise ConfigError(
            f"MODEL.SEMASK.NUM_CLASSES is {given}, but the prior's target "
            f"(MODEL.SEMASK.PRIOR_TARGET '{target}') has {needed} classes: {key}. Set it to 0 to "
            "follow the target."
        )
    return needed


def has_prior_maps(cfg: CfgNode) -> bool:
    """Whether the backbone of a model of instances has a semantic layer.

    It has no stages after the last one that the decoder or the pyramid reads.
    """
    semask = cfg.MODEL.SEMASK
    consumer = cfg.MODEL.SEM_SEG_HEAD if is_mask_classification(cfg) else cfg.MODEL.FPN
    stages = list(zip(semask.ATTENTION, semask.NUM_BLOCKS, strict=False))
    read = [i for i in range(len(stages)) if stage_name(i) in consumer.IN_FEATURES]
    return any(has_semantic_layer(*settings) for settings in stages[: max(read, default=-1) + 1])


def prior_is_supervised(cfg: CfgNode) -> bool:
    """Whether a model of instances has prior maps and a loss for them.

    Raises:
        ConfigError: see :func:`prior_classes`; or the classes and the ignore value do not fit into
            the target's one byte.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    if not has_prior_maps(cfg) or head.PRIOR_LOSS_WEIGHT <= 0:
        return False
    num_classes = prior_classes(cfg)
    if not num_classes <= head.IGNORE_VALUE <= 255:
        raise ConfigError(
            f"The prior's target has {num_classes} classes; the ignore value "
            f"(MODEL.SEM_SEG_HEAD.IGNORE_VALUE {head.IGNORE_VALUE}) must be in {num_classes}..255. "
            "MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT 0 trains without it."
        )
    return True
