"""SeMask's meta-architecture: Detectron2's segmentor with the published test protocol."""

from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor
from torch import Tensor

from .backbone.base import SemSegBackbone
from .heads.semask_fpn import SeMaskFPNHead
from .resize import resize


@META_ARCH_REGISTRY.register()
class SeMaskSegmentor(SemanticSegmentor):
    """Trains as ``SemanticSegmentor`` does; in evaluation it follows the published protocol.

    The stride-4 logits are resized to the input's size and then to the original size, one image
    at a time, without padding. Detectron2's own post-processing enlarges by exactly 4, crops the
    padding away and then resizes; the two are equal where both sides of the input are multiples
    of 4. ``MODEL.META_ARCHITECTURE: SemanticSegmentor`` selects Detectron2's.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, else :meth:`inference`; see ``SemanticSegmentor.forward``."""
        return super().forward(batched_inputs) if self.training else self.inference(batched_inputs)

    def inference(
        self, batched_inputs: list[dict[str, Any]], return_priors: bool = False
    ) -> list[dict[str, Any]]:
        """Predict each image.

        Args:
            batched_inputs: dicts with "image" (3, H, W), 0..255 in the channel order of the
                model, and optionally "height" and "width", the size of the prediction.
            return_priors: also decode the semantic-prior maps.

        Returns:
            For each image "sem_seg", logits (K, height, width); with ``return_priors`` also
            "prior", the decoded prior logits of that size, where the model has a prior head, and
            "priors", the stages' own maps, {"prior2": (K, h, w), ...}.
        """
        return [self._predict(inputs, return_priors) for inputs in batched_inputs]

    def _predict(self, inputs: dict[str, Any], return_priors: bool) -> dict[str, Any]:
        image = (inputs["image"].to(self.device) - self.pixel_mean) / self.pixel_std
        size = (image.shape[-2], image.shape[-1])
        original = (inputs.get("height", size[0]), inputs.get("width", size[1]))

        def enlarge(logits: Tensor) -> Tensor:
            return resize(resize(logits, size), original)[0]

        if not return_priors or not isinstance(self.backbone, SemSegBackbone):
            return {"sem_seg": enlarge(self.sem_seg_head.layers(self.backbone(image[None])))}
        features = self.backbone(image[None], return_priors=True)
        output: dict[str, Any] = {"sem_seg": enlarge(self.sem_seg_head.layers(features))}
        if isinstance(self.sem_seg_head, SeMaskFPNHead):
            prior = self.sem_seg_head.prior(features)
            if prior is not None:
                output["prior"] = enlarge(prior)
        output["priors"] = {k: v[0] for k, v in features.items() if k.startswith("prior")}
        return output
