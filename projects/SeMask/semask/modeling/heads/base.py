"""The protocol of segmentation heads: what a meta-architecture needs of every decoder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from semask.modeling.heads.prior import PriorSupervision
from semask.modeling.layers.resize import resize
from semask.modeling.losses.divisor import Divisor
from semask.modeling.mask_decoder.postprocess import class_scores

# What the K numbers of a pixel are. "scores" are neither logits nor probabilities: they are not
# negative, and need not add up to 1 (mask classification).
ScoreKind = Literal["logits", "probabilities", "scores"]


class SegmentationHead(nn.Module, ABC):
    """A decoder with its losses, registered in Detectron2's ``SEM_SEG_HEADS_REGISTRY``.

    There are two kinds of decoders, which differ in their predictions:

    - per pixel: {"logits": (B, K, h, w)}, class logits at any stride;
    - mask classification: {"pred_logits": (B, Q, K + 1), "pred_masks": (B, Q, h, w)}, for each of
      Q queries its class logits, the last one for "no object", and the logits of its mask.

    :func:`semantic_scores` computes a score of each class at each pixel from either.

    Attributes:
        num_classes: K.
        ignore_value: label of pixels without a class.
        score_kind: of the scores that :func:`semantic_scores` computes.
        losses_need_values: the losses depend on values in a way that tensors of shapes alone
            (PyTorch's "meta" device) cannot follow, such as a matching.
        prior_supervision: of the backbone's semantic priors; None = not supervised.
    """

    num_classes: int
    ignore_value: int = 255
    score_kind: ScoreKind = "logits"
    losses_need_values: bool = False
    prior_supervision: PriorSupervision | None

    def __init__(self) -> None:
        super().__init__()
        self.prior_supervision = None

    @abstractmethod
    def predict(self, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """The prediction for a batch.

        Args:
            features: the backbone's dictionary, {"res2": (B, C, h, w), ...}; entries with
                other names are ignored.

        Returns:
            "logits", or "pred_logits" and "pred_masks", as described above; a head may add entries.
        """

    @abstractmethod
    def losses(
        self, features: Mapping[str, Tensor], targets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The weighted losses of a batch in training.

        Args:
            features: the backbone's dictionary, with the prior maps {"prior2": (B, K, h, w), ...}
                where the head supervises them.
            targets: "sem_seg": (B, H, W) int64, 0..K-1 or ``ignore_value``, of the padded images'
                size. Heads of mask classification also need "instances", for each image
                Detectron2's ``Instances`` with ``gt_classes`` (N,) and ``gt_masks`` (N, H, W).

        Returns:
            {"loss_...": scalar}, among them "loss_prior" where the head supervises the priors.
        """

    def loss_divisors(self, targets: Mapping[str, Any]) -> dict[str, Divisor]:
        """What the losses of a batch are divided by.

        Args:
            targets: see :meth:`losses`.

        Returns:
            By the name of the loss; an entry is for all decoder layers. A loss without an entry is
            a mean over the images.
        """
        if self.prior_supervision is None:
            return {}
        return {"loss_prior": self.prior_supervision.loss.divisor(targets["sem_seg"])}

    def prior_losses(
        self, features: Mapping[str, Tensor], targets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """{"loss_prior": scalar} where the head supervises the priors, else nothing.

        Args:
            features: with the prior maps.
            targets: those of :meth:`losses`; "sem_seg" is needed where the priors are supervised.
        """
        if self.prior_supervision is None:
            return {}
        return {"loss_prior": self.prior_supervision(features, targets["sem_seg"])}

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | Mapping[str, Any] | None = None
    ) -> Any:
        """Losses in training, predictions in evaluation; called by meta-architectures.

        Args:
            features: see :meth:`predict` and :meth:`losses`.
            targets: those of :meth:`losses`, or "sem_seg" alone; needed in training.

        Returns:
            In training ``(None, losses)``, as Detectron2 has it; in evaluation the prediction.

        Raises:
            ValueError: there are no targets in training.
        """
        if not self.training:
            return self.predict(features)
        if targets is None:
            raise ValueError("A segmentation head needs labels in training ('sem_seg')")
        if isinstance(targets, Tensor):
            targets = {"sem_seg": targets}
        return None, self.losses(features, targets)


def semantic_scores(prediction: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """A score of each class at each pixel of an image.

    For mask classification see
    :func:`semask.modeling.mask_decoder.postprocess.class_scores`.

    Args:
        prediction: see :class:`SegmentationHead`.
        size: height and width of the image that the prediction is of, with its padding.

    Returns:
        (B, K, *size), of the head's ``score_kind``.
    """
    if "logits" in prediction:
        return resize(prediction["logits"], size)
    return class_scores(prediction["pred_logits"], resize(prediction["pred_masks"], size))
