"""SeMask's meta-architecture: Detectron2's segmentor with the published test protocols."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, SemanticSegmentor
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.backbone.base import SemSegBackbone
from semask.modeling.heads.per_pixel import SeMaskFPNHead
from semask.modeling.meta_arch.protocol import TestProtocol, WholeImage, build_test_protocol
from semask.ops.scores import Scores
from semask.ops.stripes import MapRows, resized


@META_ARCH_REGISTRY.register()
class SeMaskSegmentor(SemanticSegmentor):
    """Trains as ``SemanticSegmentor`` does; in evaluation it follows the published protocols.

    The stride-4 logits are resized to the input's size and then to the original size, one image
    at a time, without padding. Detectron2's own post-processing enlarges by exactly 4, crops the
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
        protocol: TestProtocol | None = None,
    ) -> None:
        """
        Args:
            backbone: Detectron2's interface of a backbone.
            sem_seg_head: predicts from its features; ``layers(features)`` are the logits.
            pixel_mean, pixel_std: of each channel, 0..255.
            protocol: how an image is predicted in evaluation; None = whole.

        Raises:
            ValueError: backbone and head disagree about the number of classes.
        """
        super().__init__(
            backbone=backbone,
            sem_seg_head=sem_seg_head,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.protocol = protocol or WholeImage()
        supervised = isinstance(sem_seg_head, SeMaskFPNHead) and sem_seg_head.prior_head is not None
        if supervised and isinstance(backbone, SemSegBackbone):
            classes = (backbone.num_semantic_classes, sem_seg_head.num_classes)
            if classes[0] != classes[1]:
                raise ValueError(
                    f"The backbone's prior maps have {classes[0]} classes and the head "
                    f"{classes[1]}; both are supervised by the same labels"
                )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "protocol": build_test_protocol(cfg)}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, else :meth:`inference`; see ``SemanticSegmentor.forward``."""
        return super().forward(batched_inputs) if self.training else self.inference(batched_inputs)

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
            For each image "sem_seg" (K, height, width): logits, or with the multi-scale protocol
            mean probabilities. With ``return_priors`` also "prior", the decoded prior logits of
            that size, where the model has a prior head, and "priors", the stages' own maps,
            {"prior2": (K, h, w), ...}; both are those of the whole "image".
        """
        return [
            {k: v.full() if isinstance(v, Scores) else v for k, v in output.items()}
            for output in (self._predict(inputs, return_priors) for inputs in batched_inputs)
        ]

    def scores(
        self, batched_inputs: list[dict[str, Any]], return_priors: bool = False
    ) -> list[dict[str, Any]]:
        """As :meth:`inference`, for those who do not need every class at every pixel.

        Args:
            batched_inputs, return_priors: see :meth:`inference`.

        Returns:
            The same, but "sem_seg" and "prior" are :class:`Scores` of the original size, whose
            ``full()`` is what :meth:`inference` returns.
        """
        return [self._predict(inputs, return_priors) for inputs in batched_inputs]

    def _predict(self, inputs: dict[str, Any], return_priors: bool) -> dict[str, Any]:
        whole = inputs["image"]
        size = (inputs.get("height", whole.shape[-2]), inputs.get("width", whole.shape[-1]))
        features: dict[str, Tensor] | None = None
        if return_priors and isinstance(self.backbone, SemSegBackbone):
            features = self.backbone(self._normalized(whole), return_priors=True)

        def network(image: Tensor) -> Tensor:
            known = features if image is whole else None
            return self.sem_seg_head.layers(known or self.backbone(self._normalized(image)))

        output: dict[str, Any] = {"sem_seg": self.protocol(network, inputs, size)}
        if features is not None:
            if isinstance(self.sem_seg_head, SeMaskFPNHead):
                prior = self.sem_seg_head.prior(features)
                if prior is not None:
                    output["prior"] = Scores(resized(MapRows(prior[0]), whole.shape[-2:], size))
            output["priors"] = {k: features[k][0] for k in self.backbone.prior_strides}
        return output

    def _normalized(self, image: Tensor) -> Tensor:
        """(3, H, W), 0..255, to the batch of one that the backbone takes."""
        return (image.to(self.device) - self.pixel_mean).div_(self.pixel_std)[None]


def check_protocol(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse a ``TEST.PROTOCOL`` that a model would silently ignore.

    Args:
        cfg: what the model has been built from.
        model: of any meta-architecture.

    Raises:
        ConfigError: the model is no SeMaskSegmentor, and the protocol is not "whole".
    """
    if cfg.TEST.PROTOCOL != "whole" and not isinstance(model, SeMaskSegmentor):
        raise ConfigError(
            f"TEST.PROTOCOL is '{cfg.TEST.PROTOCOL}', but {cfg.MODEL.META_ARCHITECTURE} knows "
            "'whole' only: set MODEL.META_ARCHITECTURE to 'SeMaskSegmentor'."
        )
