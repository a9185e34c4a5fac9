"""The SEM_SEG_HEADS entry of SeMask-FPN: class logits from Semantic FPN."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor

from semask.errors import ConfigError
from semask.modeling.heads.base import SegmentationHead
from semask.modeling.heads.prior import PriorSupervision
from semask.modeling.layers.resize import resize
from semask.modeling.losses.cross_entropy import SegmentationLoss
from semask.modeling.losses.divisor import Divisor
from semask.modeling.pixel_decoder.semantic_fpn import SemanticFPNDecoder


@SEM_SEG_HEADS_REGISTRY.register()
class SeMaskFPNHead(SegmentationHead):
    """Class logits from the features; the losses of the prediction and of the priors.

    loss = CE(prediction) + weight * CE(prior), arXiv 2112.12782, section 3.4.
    It follows Detectron2's interface of a semantic segmentation head and so also works in its
    ``SemanticSegmentor`` and ``PanopticFPN``.
    """

    @configurable
    def __init__(
        self,
        *,
        semantic_fpn: SemanticFPNDecoder,
        num_classes: int,
        loss: SegmentationLoss | None = None,
        loss_weight: float = 1.0,
        prior_supervision: PriorSupervision | None = None,
    ) -> None:
        """
        Args:
            semantic_fpn: decodes the features.
            num_classes: K.
            loss: of the prediction; None = the cross entropy as published.
            loss_weight: of the prediction's loss.
            prior_supervision: of the priors; None where the backbone has no semantic layers.
        """
        super().__init__()
        self.semantic_fpn = semantic_fpn
        self.num_classes = num_classes
        self.loss = loss or SegmentationLoss()
        self.loss_weight = loss_weight
        self.prior_supervision = prior_supervision
        self.ignore_value = self.loss.ignore_value
        self.common_stride = semantic_fpn.common_stride

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        missing = [name for name in head.IN_FEATURES if name not in input_shape]
        if missing:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES has {missing}, but the backbone returns "
                f"{list(input_shape)}."
            )
        return {
            "semantic_fpn": SemanticFPNDecoder(
                input_shape={name: input_shape[name] for name in head.IN_FEATURES},
                num_classes=head.NUM_CLASSES,
                conv_dims=head.CONVS_DIM,
                common_stride=head.COMMON_STRIDE,
                dropout=head.DROPOUT,
                norm=head.NORM,
            ),
            "num_classes": head.NUM_CLASSES,
            "loss": SegmentationLoss(
                ignore_value=head.IGNORE_VALUE,
                reduction=head.LOSS_REDUCTION,
                ohem_pixels=head.OHEM_PIXELS,
            ),
            "loss_weight": head.LOSS_WEIGHT,
            "prior_supervision": PriorSupervision.from_config(
                cfg,
                input_shape,
                num_classes=head.NUM_CLASSES,
            ),
        }

    def predict(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"logits": (B, K, h, w)} at the common stride."""
        return {"logits": self.semantic_fpn(features)}

    def losses(
        self, features: Mapping[str, Tensor], targets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The loss of the prediction, "loss_sem_seg", and "loss_prior" of supervised priors."""
        loss = self.loss(self.semantic_fpn(features), targets["sem_seg"])
        return {
            "loss_sem_seg": self.loss_weight * loss,
            **self.prior_losses(features, targets),
        }

    def loss_divisors(self, targets: Mapping[str, Any]) -> dict[str, Divisor]:
        """See :class:`SegmentationHead`."""
        divisor = self.loss.divisor(targets["sem_seg"])
        return {"loss_sem_seg": divisor, **super().loss_divisors(targets)}

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | Mapping[str, Any] | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Detectron2's interface of a semantic segmentation head.

        Args:
            features: the backbone's dictionary, in training with the priors.
            targets: (B, H, W) int64, or what :meth:`losses` takes; needed in training.

        Returns:
            In training ``(None, losses)``; in evaluation ``(logits, {})`` with logits
            (B, K, h * stride, w * stride) enlarged by the common stride.
        """
        if self.training:
            return super().forward(features, targets)
        logits = self.semantic_fpn(features)
        height, width = logits.shape[-2:]
        return resize(logits, (height * self.common_stride, width * self.common_stride)), {}
