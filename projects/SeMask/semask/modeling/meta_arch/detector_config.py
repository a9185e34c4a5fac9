"""What the meta-architecture that a config names predicts: its categories, masks, semantic map.

``MODEL.META_ARCHITECTURE`` can be any registered class; what counts is which of Detectron2's
classes it is derived from.
"""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN, RetinaNet

from semask.errors import ConfigError
from semask.modeling.backbone.base import prior_strides, stage_name, stage_stride

# What supervises the priors of a detector (MODEL.SEMASK.PRIOR_TARGET).
PRIOR_TARGETS = ("instances", "sem_seg")


def classes_section(cfg: CfgNode) -> str:
    """The section of ``MODEL`` that has a detector's NUM_CLASSES: "RETINANET" or "ROI_HEADS"."""
    return "RETINANET" if issubclass(_architecture(cfg), RetinaNet) else "ROI_HEADS"


def detector_classes(cfg: CfgNode) -> int:
    """Number of categories that a detector distinguishes, without the background."""
    return cfg.MODEL[classes_section(cfg)].NUM_CLASSES


def predicts_masks(cfg: CfgNode) -> bool:
    """Whether the detector predicts masks; otherwise it predicts boxes alone."""
    return cfg.MODEL.MASK_ON and not issubclass(_architecture(cfg), RetinaNet)


def has_semantic_head(cfg: CfgNode) -> bool:
    """Whether the detector also predicts a semantic map, for panoptic segmentation."""
    return issubclass(_architecture(cfg), PanopticFPN)


def _architecture(cfg: CfgNode) -> type:
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        raise ConfigError(f"MODEL.META_ARCHITECTURE is '{name}'; there is no such architecture.")
    return META_ARCH_REGISTRY.get(name)


def prior_classes(cfg: CfgNode) -> int:
    """Classes K of the prior maps of a detector: as many as its prior's target has.

    ``MODEL.SEMASK.NUM_CLASSES``, and where that is 0: with ``MODEL.SEMASK.PRIOR_TARGET``
    "instances" the categories that the detector tells apart and one for the background, with
    "sem_seg" ``MODEL.SEM_SEG_HEAD.NUM_CLASSES``.

    Raises:
        ConfigError: the target or the number is none that can be.
    """
    target = cfg.MODEL.SEMASK.PRIOR_TARGET
    if target not in PRIOR_TARGETS:
        raise ConfigError(
            f"MODEL.SEMASK.PRIOR_TARGET is '{target}'; it can be {' or '.join(PRIOR_TARGETS)}."
        )
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


def prior_map_strides(cfg: CfgNode) -> dict[str, int]:
    """Strides of the prior maps below a detector's feature pyramid: {"prior2": 4, ...}."""
    semask = cfg.MODEL.SEMASK
    stages = range(len(semask.ATTENTION))
    # The backbone builds no stage behind the last one that the pyramid takes.
    deepest = max(
        (stage_stride(s) for s in stages if stage_name(s) in cfg.MODEL.FPN.IN_FEATURES), default=0
    )
    strides = prior_strides(semask.ATTENTION, semask.NUM_BLOCKS)
    return {name: stride for name, stride in strides.items() if stride <= deepest}


def prior_is_supervised(cfg: CfgNode) -> bool:
    """Whether a detector of this config has prior maps and a loss for them.

    Raises:
        ConfigError: see :func:`prior_classes`; or the classes do not fit into a target of one
            byte beside the ignore value.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    if not prior_map_strides(cfg) or head.PRIOR_LOSS_WEIGHT <= 0:
        return False
    num_classes = prior_classes(cfg)
    if not num_classes <= head.IGNORE_VALUE <= 255:
        raise ConfigError(
            f"The prior's target has {num_classes} classes; beside them the ignore value "
            f"(MODEL.SEM_SEG_HEAD.IGNORE_VALUE {head.IGNORE_VALUE}) has to lie in "
            f"{num_classes}..255. MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT 0 trains without it."
        )
    return True
