"""The SEM_SEG_HEADS entry of SeMask-FPN: Semantic FPN, and the prior head in training."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from semask.modeling.backbone.base import prior_strides
from semask.modeling.heads.prior import SemanticPriorHead
from semask.modeling.layers.resize import resize
from semask.modeling.losses import REDUCTIONS, segmentation_loss
from semask.modeling.pixel_decoder.semantic_fpn import SemanticFPNHead
from semask.ops.fast_paths import fast_paths


@SEM_SEG_HEADS_REGISTRY.register()
class SeMaskFPNHead(nn.Module):
    """Prediction from the features, a second one from the priors, and their losses.

    loss = CE(prediction) + ``prior_loss_weight`` * CE(prior), arXiv 2112.12782, section 3.4.
    It follows Detectron2's interface of a semantic segmentation head and so works in its
    ``SemanticSegmentor`` as it is.

    Args:
        semantic_fpn: decodes the features.
        prior_head: decodes the priors; None for a backbone without semantic layers.
        num_classes: K; kept for consumers that ask the head.
        ignore_value: label of pixels without a class.
        loss_weight, prior_loss_weight: of the two losses.
        loss_reduction, ohem_pixels, striped_loss: see
            :func:`semask.modeling.losses.segmentation_loss`; hard example mining is used on the
            prediction's loss only.
    """

    @configurable
    def __init__(
        self,
        *,
        semantic_fpn: SemanticFPNHead,
        prior_head: SemanticPriorHead | None = None,
        num_classes: int,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
        prior_loss_weight: float = 0.4,
        loss_reduction: str = "all",
        ohem_pixels: int = 0,
        striped_loss: bool = False,
    ) -> None:
        super().__init__()
        if loss_reduction not in REDUCTIONS:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.LOSS_REDUCTION must be one of {', '.join(REDUCTIONS)}, "
                f"got {loss_reduction!r}"
            )
        if ohem_pixels < 0:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.OHEM_PIXELS must be 0 (off) or more, got {ohem_pixels}"
            )
        self.semantic_fpn = semantic_fpn
        self.prior_head = prior_head
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.common_stride = semantic_fpn.common_stride
        self.loss_weight = loss_weight
        self.prior_loss_weight = prior_loss_weight
        self.loss_reduction = loss_reduction
        self.ohem_pixels = ohem_pixels
        self.striped_loss = striped_loss

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head, semask = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.SEMASK
        # The backbone builds no stage behind its last feature.
        deepest = max(shape.stride or 0 for shape in input_shape.values())
        strides = {
            name: stride
            for name, stride in prior_strides(semask.ATTENTION, semask.NUM_BLOCKS).items()
            if stride <= deepest
        }
        supervised = bool(strides) and head.PRIOR_LOSS_WEIGHT > 0
        prior_classes = semask.NUM_CLASSES or head.NUM_CLASSES
        if supervised and prior_classes != head.NUM_CLASSES:
            raise ValueError(
                f"The prior maps have {prior_classes} classes (MODEL.SEMASK.NUM_CLASSES) "
                f"and the head {head.NUM_CLASSES} (MODEL.SEM_SEG_HEAD.NUM_CLASSES); both are "
                "supervised by the same labels. Leave MODEL.SEMASK.NUM_CLASSES at 0 to follow"
            )
        missing = [name for name in head.IN_FEATURES if name not in input_shape]
        if missing:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES asks for {missing}, "
                f"but the backbone returns {list(input_shape)}"
            )
        return {
            "semantic_fpn": SemanticFPNHead(
                input_shape={name: input_shape[name] for name in head.IN_FEATURES},
                num_classes=head.NUM_CLASSES,
                conv_dims=head.CONVS_DIM,
                common_stride=head.COMMON_STRIDE,
                dropout=head.DROPOUT,
                norm=head.NORM,
                winograd="winograd" in fast_paths(cfg),
                chunked="chunked" in fast_paths(cfg),
            ),
            "prior_head": (
                SemanticPriorHead(strides=strides, common_stride=head.COMMON_STRIDE)
                if supervised
                else None
            ),
            "num_classes": head.NUM_CLASSES,
            "ignore_value": head.IGNORE_VALUE,
            "loss_weight": head.LOSS_WEIGHT,
            "prior_loss_weight": head.PRIOR_LOSS_WEIGHT,
            "loss_reduction": head.LOSS_REDUCTION,
            "ohem_pixels": head.OHEM_PIXELS,
            "striped_loss": "striped_loss" in fast_paths(cfg),
        }

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Losses in training, the prediction in evaluation.

        Args:
            features: the backbone's dictionary, in training with the priors.
            targets: (B, H, W) int64, needed in training.

        Returns:
            In training ``(None, losses)``; in evaluation ``(logits, {})`` with logits
            (B, K, h * stride, w * stride) enlarged by the common stride, as Detectron2 has it.
        """
        if self.training:
            if targets is None:
                raise ValueError("A semantic segmentation head needs 'sem_seg' labels in training")
            return None, self.losses(features, targets)
        logits = self.layers(features)
        height, width = logits.shape[-2:]
        return resize(logits, (height * self.common_stride, width * self.common_stride)), {}

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Prediction logits (B, K, h, w) at the common stride."""
        return self.semantic_fpn(features)

    def prior(self, features: Mapping[str, Tensor]) -> Tensor | None:
        """Prior logits (B, K, h, w) at the common stride; None without a prior head."""
        if self.prior_head is None:
            return None
        size = features[self.semantic_fpn.in_features[0]].shape[-2:]
        return self.prior_head(features, (size[0], size[1]))

    def losses(self, features: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """``loss_sem_seg`` and, with a prior head, ``loss_prior``, both weighted scalars."""
        losses = {
            "loss_sem_seg": self.loss_weight
            * segmentation_loss(
                self.layers(features),
                targets,
                ignore_value=self.ignore_value,
                reduction=self.loss_reduction,
                ohem_pixels=self.ohem_pixels,
                striped=self.striped_loss,
            )
        }
        prior = self.prior(features)
        if prior is not None:
            losses["loss_prior"] = self.prior_loss_weight * segmentation_loss(
                prior,
                targets,
                ignore_value=self.ignore_value,
                reduction=self.loss_reduction,
                striped=self.striped_loss,
            )
        return losses
