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
from semask.modeling.architecture import prior_classes, prior_is_supervised
from semask.modeling.backbone.contract import FeatureShapes
from semask.modeling.heads.prior import PRIOR_TARGET, PriorSupervision


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
        if not prior_is_supervised(cfg):
            return {**arguments, "prior_supervision": None}
        backbone = arguments["backbone"]
        shapes, strides = backbone.output_shape(), getattr(backbone, "prior_strides", None)
        if strides:
            # A subclass of Detectron2's FPN may inherit the pyramid's ``output_shape``.
            shapes = FeatureShapes(shapes, strides)
        supervision = PriorSupervision.from_config(cfg, shapes, prior_classes(cfg))
        if supervision is None or not getattr(backbone, "num_semantic_classes", 0):
            raise ConfigError(
                f"The backbone {type(backbone).__name__} has no prior maps to supervise: set "
                "MODEL.BACKBONE.NAME to one with semantic layers, or "
                "MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT to 0."
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
