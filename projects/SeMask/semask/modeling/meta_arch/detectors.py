"""The semantic prior's supervision in Detectron2's detectors, as one more loss.

``SeMaskGeneralizedRCNN``, ``SeMaskRetinaNet`` and ``SeMaskPanopticFPN`` are Detectron2's
meta-architectures with that loss. Their code runs unchanged: everything else, and all of
inference, is Detectron2's.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, RetinaNet
from detectron2.structures import ImageList
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.backbone.base import prior_strides, stage_name, stage_stride
from semask.modeling.heads.prior import PRIOR_TARGET, PriorSupervision
from semask.modeling.meta_arch.mask_classification import SeMaskMaskFormer


@contextlib.contextmanager
def outputs_of(backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dictionary with the backbone's output in this thread, filled within the ``with`` block.

    Detectron2's meta-architectures keep the backbone's output in a local variable. A hook that
    exists for one forward pass reads it, without a copy of their code or a second pass. No state
    stays on a module, so activation checkpointing, DistributedDataParallel, averaged weights and
    later forward passes work as usual, also with a compiled ``forward``.
    """
    outputs: dict[str, Tensor] = {}
    thread = threading.get_ident()

    def keep(_module: nn.Module, _args: Any, output: Mapping[str, Tensor]) -> None:
        if threading.get_ident() == thread:
            outputs.update(output)

    handle = backbone.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


class PriorSupervisedDetector:
    """Adds ``loss_prior`` to the losses of the meta-architecture that it is mixed into.

    Put it in front: ``class SeMaskRetinaNet(PriorSupervisedDetector, RetinaNet)``. In training
    every input needs "prior_target"; see :class:`semask.data.InstanceMapper`.
    """

    backbone: nn.Module
    training: bool

    @configurable
    def __init__(
        self, *, prior_supervision: PriorSupervision | None = None, **arguments: Any
    ) -> None:
        """
        Args:
            prior_supervision: None leaves the meta-architecture as it is.
            arguments: those of the meta-architecture.

        Raises:
            ConfigError: see :meth:`PriorSupervision.check_backbone`.
        """
        super().__init__(**arguments)
        self.prior_supervision = prior_supervision
        if prior_supervision is not None:
            prior_supervision.check_backbone(self.backbone)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)  # type: ignore[misc]  # the meta-architecture's
        supervision = None
        if prior_is_supervised(cfg):
            supervision = PriorSupervision.from_config(
                cfg, strides=prior_map_strides(cfg), num_classes=prior_classes(cfg)
            )
        return {**arguments, "prior_supervision": supervision}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As Detectron2's, with ``loss_prior`` among the losses in training.

        Raises:
            ValueError: an input has no "prior_target", or of another size than its image.
        """
        if not self.training or self.prior_supervision is None:
            return super().forward(batched_inputs)  # type: ignore[misc]
        with outputs_of(self.backbone) as outputs:
            losses = super().forward(batched_inputs)  # type: ignore[misc]
        targets = self._targets(batched_inputs)
        return {**losses, "loss_prior": self.prior_supervision(outputs, targets)}

    def _targets(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """(B, H, W), padded as the images are."""
        assert self.prior_supervision is not None
        for inputs in batched_inputs:
            target, image = inputs.get(PRIOR_TARGET), inputs["image"]
            if target is None or target.shape != image.shape[-2:]:
                found = "none" if target is None else f"one of {tuple(target.shape)}"
                raise ValueError(
                    f"The semantic prior is supervised by '{PRIOR_TARGET}', (H, W) of the image "
                    f"{tuple(image.shape[-2:])}; the input has {found}. InstanceMapper creates it "
                    "(TASK 'instance'); MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT 0 trains without it."
                )
        ignore_value = self.prior_supervision.ignore_value
        targets = ImageList.from_tensors(
            [inputs[PRIOR_TARGET].to(self.device) for inputs in batched_inputs],  # type: ignore[attr-defined]
            self.backbone.size_divisibility,
            ignore_value,
        ).tensor
        # Detectron2's main branch: some backbones need squares.
        constraints = getattr(self.backbone, "padding_constraints", None) or {}
        side = constraints.get("square_size", 0)
        if side > 0:
            height, width = targets.shape[-2:]
            targets = F.pad(targets, (0, side - width, 0, side - height), value=ignore_value)
        return targets


@META_ARCH_REGISTRY.register()
class SeMaskGeneralizedRCNN(PriorSupervisedDetector, GeneralizedRCNN):
    """Faster, Mask and Cascade R-CNN with a supervised semantic prior."""


@META_ARCH_REGISTRY.register()
class SeMaskRetinaNet(PriorSupervisedDetector, RetinaNet):
    """RetinaNet with a supervised semantic prior."""


@META_ARCH_REGISTRY.register()
class SeMaskPanopticFPN(PriorSupervisedDetector, PanopticFPN):
    """Panoptic FPN with a supervised semantic prior."""


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
    return cfg.MODEL[classes_section(cfg)].NUM_CLASSES


def predicts_masks(cfg: CfgNode) -> bool:
    """Whether the model predicts masks, not only boxes."""
    if is_mask_classification(cfg):
        return True
    return cfg.MODEL.MASK_ON and not issubclass(_architecture(cfg), RetinaNet)


def is_mask_classification(cfg: CfgNode) -> bool:
    """Whether the model predicts masks with a class each, of things and stuff alike.

    Its classes are then one series; Panoptic FPN counts things and stuff separately.
    """
    return issubclass(_architecture(cfg), SeMaskMaskFormer)


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


def prior_map_strides(cfg: CfgNode) -> dict[str, int]:
    """Strides of the backbone's prior maps, by name: {"prior2": 4, ...}."""
    semask = cfg.MODEL.SEMASK
    stages = range(len(semask.ATTENTION))
    consumer = cfg.MODEL.SEM_SEG_HEAD if is_mask_classification(cfg) else cfg.MODEL.FPN
    # The backbone has no stages after the last one that is used.
    deepest = max(
        (stage_stride(s) for s in stages if stage_name(s) in consumer.IN_FEATURES), default=0
    )
    strides = prior_strides(semask.ATTENTION, semask.NUM_BLOCKS)
    return {name: stride for name, stride in strides.items() if stride <= deepest}


def prior_is_supervised(cfg: CfgNode) -> bool:
    """Whether a model of instances has prior maps and a loss for them.

    Raises:
        ConfigError: see :func:`prior_classes`; or the classes and the ignore value do not fit into
            the target's one byte.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    if not prior_map_strides(cfg) or head.PRIOR_LOSS_WEIGHT <= 0:
        return False
    num_classes = prior_classes(cfg)
    if not num_classes <= head.IGNORE_VALUE <= 255:
        raise ConfigError(
            f"The prior's target has {num_classes} classes; the ignore value "
            f"(MODEL.SEM_SEG_HEAD.IGNORE_VALUE {head.IGNORE_VALUE}) must be in {num_classes}..255. "
            "MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT 0 trains without it."
        )
    return True
