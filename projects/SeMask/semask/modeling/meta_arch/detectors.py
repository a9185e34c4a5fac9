"""The semantic prior's supervision in Detectron2's detectors, as one more loss.

``SeMaskGeneralizedRCNN``, ``SeMaskRetinaNet`` and ``SeMaskPanopticFPN`` are Detectron2's
meta-architectures with that loss. Their code runs unchanged: everything else, and all of
inference, is Detectron2's.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, RetinaNet
from detectron2.structures import ImageList
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.backbone.base import SemSegBackbone, prior_strides, stage_name, stage_stride
from semask.modeling.backbone.detector_fpn import prior_classes
from semask.modeling.heads.prior import SemanticPriorHead
from semask.modeling.losses import REDUCTIONS, segmentation_loss
from semask.ops.fast_paths import fast_paths

# Entry of a model's input: (H, W) int64, the class of each pixel of "image", or the ignore value.
PRIOR_TARGET = "prior_target"


class PriorLoss(nn.Module):
    """The decoded prior maps against a semantic target (arXiv 2112.12782, section 3.4).

    It has no parameters.
    """

    def __init__(
        self,
        *,
        prior_head: SemanticPriorHead,
        num_classes: int,
        weight: float = 0.4,
        ignore_value: int = 255,
        reduction: str = "valid",
        common_stride: int = 4,
        striped: bool = False,
    ) -> None:
        """
        Args:
            prior_head: decodes the prior maps.
            num_classes: K, of the maps and of the target.
            weight: of the loss, positive.
            ignore_value: of target pixels that do not count, K..255.
            reduction: see :func:`semask.modeling.losses.segmentation_loss`.
            common_stride: of the decoded map.
            striped: see :func:`semask.modeling.losses.segmentation_loss`.

        Raises:
            ValueError: an argument is not as described.
        """
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.LOSS_REDUCTION must be one of {', '.join(REDUCTIONS)}, "
                f"got {reduction!r}"
            )
        if not num_classes <= ignore_value <= 255:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignore_value}; the prior's target has the "
                f"classes 0..{num_classes - 1}, so it has to lie in {num_classes}..255"
            )
        self.prior_head = prior_head
        self.num_classes = num_classes
        self.weight = weight
        self.ignore_value = ignore_value
        self.reduction = reduction
        self.common_stride = common_stride
        self.striped = striped

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "PriorLoss | None":
        """What a config asks for; None without semantic layers or with a weight of 0.

        Raises:
            ConfigError: see :func:`semask.modeling.backbone.detector_fpn.prior_classes`; or the
                classes do not fit into a map of one byte beside the ignore value.
        """
        if not prior_is_supervised(cfg):
            return None
        head, strides, num_classes = cfg.MODEL.SEM_SEG_HEAD, _strides(cfg), prior_classes(cfg)
        return cls(
            prior_head=SemanticPriorHead(strides=strides, common_stride=head.COMMON_STRIDE),
            num_classes=num_classes,
            weight=head.PRIOR_LOSS_WEIGHT,
            ignore_value=head.IGNORE_VALUE,
            reduction=head.LOSS_REDUCTION,
            common_stride=head.COMMON_STRIDE,
            striped="striped_loss" in fast_paths(cfg),
        )

    def forward(self, priors: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The weighted loss of a batch.

        Args:
            priors: {"prior2": (B, K, h, w), ...}; other entries are passed over.
            targets: (B, H, W) int64 in 0..K-1, or the ignore value; H and W are those of the
                images in the batch, with their padding.

        Returns:
            A scalar; 0 where no pixel counts.
        """
        height, width = (-(-side // self.common_stride) for side in targets.shape[-2:])
        return self.weight * segmentation_loss(
            self.prior_head(priors, (height, width)),
            targets,
            ignore_value=self.ignore_value,
            reduction=self.reduction,
            striped=self.striped,
        )


def prior_is_supervised(cfg: CfgNode) -> bool:
    """Whether a detector has semantic layers, and their loss a weight.

    Raises:
        ConfigError: see :func:`semask.modeling.backbone.detector_fpn.prior_classes`; or the
            classes do not fit into a map of one byte beside the ignore value.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    if not _strides(cfg) or head.PRIOR_LOSS_WEIGHT <= 0:
        return False
    num_classes = prior_classes(cfg)
    if num_classes > head.IGNORE_VALUE:
        raise ConfigError(
            f"The prior's target has {num_classes} classes; beside the ignore value "
            f"(MODEL.SEM_SEG_HEAD.IGNORE_VALUE {head.IGNORE_VALUE}) there can be "
            f"{head.IGNORE_VALUE}. MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT 0 trains without it."
        )
    return True


def _strides(cfg: CfgNode) -> dict[str, int]:
    """Stride of each prior map below the pyramid."""
    semask, used = cfg.MODEL.SEMASK, cfg.MODEL.FPN.IN_FEATURES
    stages = range(len(semask.ATTENTION))
    # The backbone builds no stage behind the last one that the pyramid takes.
    deepest = max((stage_stride(s) for s in stages if stage_name(s) in used), default=0)
    strides = prior_strides(semask.ATTENTION, semask.NUM_BLOCKS)
    return {name: stride for name, stride in strides.items() if stride <= deepest}


@contextlib.contextmanager
def outputs_of(backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dictionary that has what the backbone returns to this thread within the ``with`` block.

    Detectron2's meta-architectures keep the backbone's output in a local variable. A hook that
    lives as long as one forward pass sees it without a copy of their code and without a second
    pass, and nothing stays on a module: so activation checkpointing, DistributedDataParallel,
    averaged weights and a further forward pass find it as it was. A hook runs around the
    module's ``forward``, so that a compiled or checkpointed one is as good.
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


class PriorSupervision:
    """Adds ``loss_prior`` to the losses of the meta-architecture that it is mixed into.

    Put it in front: ``class SeMaskRetinaNet(PriorSupervision, RetinaNet)``. In training every
    input needs "prior_target"; see :class:`semask.data.InstanceMapper`.
    """

    backbone: nn.Module
    training: bool

    @configurable
    def __init__(self, *, prior_loss: PriorLoss | None = None, **arguments: Any) -> None:
        """
        Args:
            prior_loss: None leaves the meta-architecture as it is.
            arguments: those of the meta-architecture.

        Raises:
            ValueError: the backbone has no prior maps, or of another number of classes.
        """
        super().__init__(**arguments)
        self.prior_loss = prior_loss
        if prior_loss is None:
            return
        classes = getattr(self.backbone, "num_semantic_classes", 0)
        if not isinstance(self.backbone, SemSegBackbone) or classes != prior_loss.num_classes:
            raise ValueError(
                f"The prior's target has {prior_loss.num_classes} classes, but the prior maps of "
                f"the backbone {type(self.backbone).__name__} have {classes}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)  # type: ignore[misc]  # the meta-architecture's
        return {**arguments, "prior_loss": PriorLoss.from_config(cfg)}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As Detectron2's, with ``loss_prior`` among the losses in training.

        Raises:
            ValueError: an input has no "prior_target", or of another size than its image.
        """
        if not self.training or self.prior_loss is None:
            return super().forward(batched_inputs)  # type: ignore[misc]
        with outputs_of(self.backbone) as outputs:
            losses = super().forward(batched_inputs)  # type: ignore[misc]
        return {**losses, "loss_prior": self.prior_loss(outputs, self._targets(batched_inputs))}

    def _targets(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """(B, H, W), padded as the images are."""
        assert self.prior_loss is not None
        for inputs in batched_inputs:
            target, image = inputs.get(PRIOR_TARGET), inputs["image"]
            if target is None or target.shape != image.shape[-2:]:
                found = "none" if target is None else f"one of {tuple(target.shape)}"
                raise ValueError(
                    f"The semantic prior is supervised by '{PRIOR_TARGET}', (H, W) of the image "
                    f"{tuple(image.shape[-2:])}; the input has {found}. InstanceMapper makes it "
                    "(TASK 'instance'); MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT 0 does "
                    "without."
                )
        return ImageList.from_tensors(
            [inputs[PRIOR_TARGET].to(self.device) for inputs in batched_inputs],  # type: ignore[attr-defined]
            self.backbone.size_divisibility,
            self.prior_loss.ignore_value,
        ).tensor


@META_ARCH_REGISTRY.register()
class SeMaskGeneralizedRCNN(PriorSupervision, GeneralizedRCNN):
    """Faster, Mask and Cascade R-CNN with a supervised semantic prior."""


@META_ARCH_REGISTRY.register()
class SeMaskRetinaNet(PriorSupervision, RetinaNet):
    """RetinaNet with a supervised semantic prior."""


@META_ARCH_REGISTRY.register()
class SeMaskPanopticFPN(PriorSupervision, PanopticFPN):
    """Panoptic FPN with a supervised semantic prior."""
