"""SeMask's meta-architecture: Detectron2's segmentor with the published test protocols."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, SemanticSegmentor
from detectron2.structures import ImageList
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.backbone.contract import SemSegBackbone
from semask.modeling.heads.base import ScoreKind, SegmentationHead, semantic_scores
from semask.modeling.heads.prior import PriorSupervision
from semask.modeling.layers.resize import resize, up_to_multiple
from semask.modeling.losses.divisor import Divisor
from semask.modeling.meta_arch.protocol import InferenceProtocol, WholeImage, build_test_protocol


@META_ARCH_REGISTRY.register()
class SeMaskSegmentor(SemanticSegmentor):
    """Trains as ``SemanticSegmentor`` does; in evaluation it follows the published protocols.

    The stride-4 logits are resized to the input's size and then to the original size, one image
    at a time, without padding beyond the backbone's ``size_divisibility`` (0 for
    :class:`SeMaskBackbone`). Detectron2's own post-processing enlarges by exactly 4, crops the
    padding away and then resizes; the two are equal where both sides of the input are multiples
    of 4. ``MODEL.META_ARCHITECTURE: SemanticSegmentor`` selects Detectron2's.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        protocol: InferenceProtocol | None = None,
    ) -> None:
        """
        Args:
            backbone: Detectron2's interface of a backbone.
            sem_seg_head: a :class:`SegmentationHead`, or a head of Detectron2, whose
                ``layers(features)`` are class logits.
            pixel_mean, pixel_std: of each channel, 0..255.
            protocol: how an image is predicted in evaluation; None = whole.

        Raises:
            ConfigError: backbone and head disagree about the number of classes.
        """
        super().__init__(
            backbone=backbone,
            sem_seg_head=sem_seg_head,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.protocol = protocol or WholeImage()
        if self.prior_supervision is not None:
            self.prior_supervision.check_backbone(backbone)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "protocol": build_test_protocol(cfg)}

    @property
    def prior_supervision(self) -> PriorSupervision | None:
        """See :class:`SegmentationHead`."""
        supervision: PriorSupervision | None = getattr(self.sem_seg_head, "prior_supervision", None)
        return supervision

    @property
    def score_kind(self) -> ScoreKind:
        """The kind of scores in "sem_seg" of :meth:`inference`."""
        return self.protocol.score_kind(self._network_kind)

    @property
    def _network_kind(self) -> ScoreKind:
        kind: ScoreKind = getattr(self.sem_seg_head, "score_kind", "logits")
        return kind

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, else :meth:`inference`; see ``SemanticSegmentor.forward``."""
        return super().forward(batched_inputs) if self.training else self.inference(batched_inputs)

    def loss_divisors(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Divisor]:
        """What the losses of a batch are divided by; see :meth:`SegmentationHead.loss_divisors`.

        Args:
            batched_inputs: those of a training step.
        """
        if not isinstance(self.sem_seg_head, SegmentationHead):
            return {}
        labels = [inputs["sem_seg"].to(self.device) for inputs in batched_inputs]
        padded = ImageList.from_tensors(
            labels, self.backbone.size_divisibility, self.sem_seg_head.ignore_value
        )
        return self.sem_seg_head.loss_divisors({"sem_seg": padded.tensor})

    def inference(
        self, batched_inputs: list[dict[str, Any]], return_priors: bool = False
    ) -> list[dict[str, Any]]:
        """Predict each image.

        Args:
            batched_inputs: dicts with "image" (3, H, W), 0..255 in the channel order of the
                model, and optionally "height" and "width", the size of the prediction. The
                multi-scale protocol also needs "images", the image at each of its sizes.
            return_priors: also decode the semantic-prior maps.

        Returns:
            For each image "sem_seg" (K, height, width), of :attr:`score_kind`. With
            ``return_priors`` also "prior", the decoded prior logits of that size, where the head
            supervises priors, and "priors", the stages' own maps, {"prior2": (K, h, w), ...};
            both are those of the whole "image".
        """
        return [self.predict(inputs, return_priors) for inputs in batched_inputs]

    def predict(self, inputs: dict[str, Any], return_priors: bool = False) -> dict[str, Any]:
        """Predict one image; see :meth:`inference`."""
        whole = inputs["image"]
        size = (inputs.get("height", whole.shape[-2]), inputs.get("width", whole.shape[-1]))
        features: dict[str, Tensor] | None = None
        if return_priors and isinstance(self.backbone, SemSegBackbone):
            features = self.backbone(self._normalized(whole), return_priors=True)

        def network(image: Tensor) -> Tensor:
            known = features if image is whole else None
            outputs = known or self.backbone(self._normalized(image))
            return self.class_scores(outputs, (image.shape[-2], image.shape[-1]))

        output = {"sem_seg": self.protocol(network, inputs, size, self._network_kind)}
        if features is not None:
            output |= self.prior_maps(features, (whole.shape[-2], whole.shape[-1]), size)
        return output

    def prior_maps(
        self, features: Mapping[str, Tensor], image_size: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, Any]:
        """The entries "prior" and "priors" of :meth:`inference`.

        Args:
            features: of one image, with the priors.
            image_size: its height and width.
            size: of the decoded prior.
        """
        output: dict[str, Any] = {
            "priors": {k: features[k][0] for k in self.backbone.prior_strides}
        }
        if self.prior_supervision is not None:
            decoded = self.prior_supervision.decode(features, self.padded_size(image_size))
            output["prior"] = self.resized(decoded, image_size, size)
        return output

    def class_scores(self, features: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Scores (K, *size) from the features of one image of that size."""
        scores = semantic_scores(self.head_prediction(features), self.padded_size(size))[0]
        return scores[:, : size[0], : size[1]]

    def head_prediction(self, features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the head predicts; see :meth:`SegmentationHead.predict`."""
        if isinstance(self.sem_seg_head, SegmentationHead):
            return self.sem_seg_head.predict(features)
        return {"logits": self.sem_seg_head.layers(features)}

    def resized(self, maps: Tensor, *sizes: tuple[int, int]) -> Tensor:
        """Resize a map (1, K, h, w) of a padded image to one size after the other.

        Args:
            maps: any size.
            sizes: the first is that of the image without padding.

        Returns:
            (K, *last size).
        """
        padded = self.padded_size(sizes[0])
        if padded != sizes[0]:
            maps = resize(maps, padded)[..., : sizes[0][0], : sizes[0][1]]
        for size in sizes:
            maps = resize(maps, size)
        return maps[0]

    def _normalized(self, image: Tensor) -> Tensor:
        """(3, H, W), 0..255, to the batch of one that the backbone takes."""
        normalized = (image.to(self.device) - self.pixel_mean).div_(self.pixel_std)[None]
        return self.padded(normalized)

    def padded(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), zero-padded right and bottom to :meth:`padded_size`."""
        height, width = images.shape[-2:]
        new_height, new_width = self.padded_size((height, width))
        return F.pad(images, (0, new_width - width, 0, new_height - height))

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of an image of ``size`` after padding."""
        multiple = max(1, self.backbone.size_divisibility)
        height, width = (up_to_multiple(side, multiple) for side in size)
        return height, width


def check_protocol(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse a ``TEST.PROTOCOL`` that the model would silently ignore.

    Args:
        cfg: of the model.
        model: of any meta-architecture.

    Raises:
        ConfigError: the model has no test protocol, and the protocol is not "whole".
    """
    if cfg.TEST.PROTOCOL != "whole" and not hasattr(model, "protocol"):
        raise ConfigError(
            f"TEST.PROTOCOL is '{cfg.TEST.PROTOCOL}', but {cfg.MODEL.META_ARCHITECTURE} supports "
            "only 'whole': set MODEL.META_ARCHITECTURE to 'SeMaskSegmentor'."
        )
