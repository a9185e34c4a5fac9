"""What the meta-architecture that a config names predicts: its categories, masks, semantic map.

``MODEL.META_ARCHITECTURE`` can be any registered class; what counts is which of Detectron2's
classes it is derived from.
"""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN, RetinaNet

from semask.errors import ConfigError


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
