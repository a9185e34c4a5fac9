"""The meta-architecture of mask classification (arXiv 2107.06278; arXiv 2112.01527)."""

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import Instances
from torch import Tensor, nn

from semask.errors import ConfigError, DataError
from semask.modeling.backbone.contract import SemSegBackbone
from semask.modeling.heads.base import ScoreKind, SegmentationHead, semantic_scores
from semask.modeling.heads.prior import PRIOR_TARGET
from semask.modeling.layers.resize import resize, up_to_multiple
from semask.modeling.losses.divisor import Divisor
from semask.modeling.mask_decoder.postprocess import (
    PanopticRule,
    QueryMasks,
    as_instances,
    class_scores,
    crop_and_resize,
    instance_prediction,
    panoptic_prediction,
    strongest_queries,
)
from semask.modeling.meta_arch.protocol import InferenceProtocol, WholeImage
from semask.modeling.meta_arch.semantic import SeMaskSegmentor
from semask.modeling.meta_arch.targets import (
    annotation,
    class_masks,
    instance_masks,
    pad,
    source_of,
)
from semask.utils.precision import at_least_float32


@META_ARCH_REGISTRY.register()
class SeMaskMaskFormer(SeMaskSegmentor):
    """A class and a mask for each query, post-processed for the task.

    In evaluation ``sem_seg_head(features)`` gives {"pred_logits": (B, Q, K + 1), "pred_masks":
    (B, Q, h, w)}; nothing else of the head is used. :class:`MaskClassificationHead` adds
    "aux_outputs" for ``sem_seg_head(features, return_aux=True)``.

    Attributes:
        classifies_masks: see :func:`semask.modeling.architecture.is_mask_classification`.
    """

    classifies_masks = True

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        protocol: InferenceProtocol | None = None,
        size_divisibility: int = 32,
        semantic_on: bool = True,
        instance_on: bool = False,
        panoptic_on: bool = False,
        resize_masks: bool = False,
        detections_per_image: int = 100,
        panoptic_rule: PanopticRule | None = None,
    ) -> None:
        """
        Args:
            backbone: Detectron2's interface of a backbone.
            sem_seg_head: a head of mask classification.
            pixel_mean, pixel_std: of each channel, 0..255.
            protocol: how the semantic scores of an image are predicted; None = whole.
            size_divisibility: images are padded to multiples of it.
            semantic_on, instance_on, panoptic_on: what is predicted; at least one of them.
            resize_masks: compute the semantic scores from masks of the original size; always so
                where instances or panoptic segments are predicted, too.
            detections_per_image: number of instances.
            panoptic_rule: needed for ``panoptic_on``.

        Raises:
            ConfigError: nothing is to be predicted, or the protocol does not fit.
        """
        super().__init__(
            backbone=backbone,
            sem_seg_head=sem_seg_head,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            protocol=protocol,
        )
        self.semantic_on = semantic_on
        self.instance_on = instance_on
        self.panoptic_on = panoptic_on
        self.size_divisibility = size_divisibility
        self.resize_masks = resize_masks or instance_on or panoptic_on
        self.detections_per_image = detections_per_image
        self.panoptic_rule = panoptic_rule
        self._check()

    def _check(self) -> None:
        keys = "MODEL.MASK_FORMER.TEST"
        if not (self.semantic_on or self.instance_on or self.panoptic_on):
            raise ConfigError(
                f"The model has nothing to predict: set one of {keys}.SEMANTIC_ON, INSTANCE_ON and "
                "PANOPTIC_ON."
            )
        if self.size_divisibility < 1:
            raise ConfigError(
                "MODEL.MASK_FORMER.SIZE_DIVISIBILITY must be 1 or more, got "
                f"{self.size_divisibility}."
            )
        if self.panoptic_on and self.panoptic_rule is None:
            raise ConfigError(
                f"{keys}.PANOPTIC_ON needs the thing classes, but no dataset has "
                "'thing_dataset_id_to_contiguous_id' in its metadata."
            )
        if self.resize_masks and not isinstance(self.protocol, WholeImage):
            raise ConfigError(
                "TEST.PROTOCOL must be 'whole' with any of INSTANCE_ON, PANOPTIC_ON and "
                f"SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE of {keys}: the others average the "
                "semantic scores of several views."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        former = cfg.MODEL.MASK_FORMER
        arguments = super().from_config(cfg)
        things = _things(cfg)
        rule = None
        if things is not None:
            rule = PanopticRule(
                things=things,
                object_mask_threshold=former.TEST.OBJECT_MASK_THRESHOLD,
                overlap_threshold=former.TEST.OVERLAP_THRESHOLD,
                inside_only=getattr(arguments["sem_seg_head"], "inside_only", True),
            )
        return {
            **arguments,
            "size_divisibility": former.SIZE_DIVISIBILITY,
            "semantic_on": former.TEST.SEMANTIC_ON,
            "instance_on": former.TEST.INSTANCE_ON,
            "panoptic_on": former.TEST.PANOPTIC_ON,
            "resize_masks": former.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "panoptic_rule": rule,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, else :meth:`inference`.

        Args:
            batched_inputs: "image" (3, H, W), 0..255; in training also "instances" with
                ``gt_classes`` (N,) and ``gt_masks`` (N, H, W), and where priors are supervised
                "prior_target" (H, W), or else "sem_seg" (H, W). Without "instances" there is one
                for each class of "sem_seg".

        Raises:
            DataError: an input lacks annotations, or they do not fit the image or the classes.
        """
        if not self.training:
            return self.inference(batched_inputs)
        size = self._batch_size(batched_inputs)
        images = torch.cat(
            [pad(self._normalized(inputs["image"]), size, 0) for inputs in batched_inputs]
        )
        targets = self._targets(batched_inputs, size)
        _, losses = self.sem_seg_head(self.backbone(images), targets)
        return losses

    def loss_divisors(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Divisor]:
        """See :class:`SeMaskSegmentor`."""
        if not isinstance(self.sem_seg_head, SegmentationHead):
            return {}
        size = self._batch_size(batched_inputs)
        return self.sem_seg_head.loss_divisors(self._targets(batched_inputs, size))

    def _batch_size(self, batched_inputs: list[dict[str, Any]]) -> tuple[int, int]:
        """Height and width of a batch's images with their padding."""
        sizes = [inputs["image"].shape[-2:] for inputs in batched_inputs]
        return self.padded_size((max(h for h, _ in sizes), max(w for _, w in sizes)))

    def _targets(
        self, batched_inputs: list[dict[str, Any]], size: tuple[int, int]
    ) -> dict[str, Any]:
        """What the head takes in training, of a batch of this padded size."""
        targets: dict[str, Any] = {
            "instances": [self._instances(inputs, size) for inputs in batched_inputs]
        }
        if self.prior_supervision is not None:
            targets["sem_seg"] = torch.stack([self._labels(x, size) for x in batched_inputs])
        return targets

    def _instances(self, inputs: Mapping[str, Any], size: tuple[int, int]) -> Instances:
        """An image's instances with masks of the padded size, on the model's device."""
        if "instances" in inputs:
            instances = inputs["instances"]
        else:
            instances = class_masks(annotation(inputs, "sem_seg"), self.sem_seg_head.ignore_value)
        height, width = inputs["image"].shape[-2:]
        labels = instances.gt_classes
        masks = instance_masks(instances, height, width, source_of(inputs))
        if masks.shape != (len(labels), height, width):
            raise DataError(
                f"{source_of(inputs)} has masks of the shape {tuple(masks.shape)}; for its "
                f"{len(labels)} classes they must be {(len(labels), height, width)}."
            )
        classes = self.sem_seg_head.num_classes
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise DataError(
                f"{source_of(inputs)} has an instance of class {int(wrong[0])}; "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {classes}."
            )
        padded = Instances(size)
        padded.gt_classes = labels.to(self.device)
        padded.gt_masks = pad(masks.to(self.device), size, 0)
        return padded

    def _labels(self, inputs: Mapping[str, Any], size: tuple[int, int]) -> Tensor:
        key = PRIOR_TARGET if PRIOR_TARGET in inputs else "sem_seg"
        labels = annotation(inputs, key).to(self.device)
        if labels.shape != inputs["image"].shape[-2:]:
            raise DataError(
                f"{source_of(inputs)} has a label map of {tuple(labels.shape)} and an image of "
                f"{tuple(inputs['image'].shape[-2:])} pixels."
            )
        return pad(labels, size, self.sem_seg_head.ignore_value)

    def predict(self, inputs: dict[str, Any], return_priors: bool = False) -> dict[str, Any]:
        """Predict one image.

        Args:
            inputs, return_priors: see :meth:`SeMaskSegmentor.inference`.

        Returns:
            As selected, "sem_seg" (K, height, width) class scores; "instances",
            Detectron2's ``Instances`` with ``pred_classes``, ``scores``, ``pred_masks`` (N, height,
            width) bool and ``pred_boxes``, not ordered and without a threshold; "panoptic_seg", a
            map of ids and the segments, see
            :func:`semask.modeling.mask_decoder.postprocess.panoptic_prediction`. With
            ``return_priors`` also "prior" and "priors", as :class:`SeMaskSegmentor` has them.
        """
        if not self.resize_masks:
            return super().predict(inputs, return_priors)
        image = inputs["image"]
        image_size = (image.shape[-2], image.shape[-1])
        size = (inputs.get("height", image_size[0]), inputs.get("width", image_size[1]))
        with_priors = return_priors and isinstance(self.backbone, SemSegBackbone)
        arguments = {"return_priors": True} if with_priors else {}
        features = self.backbone(self._normalized(image), **arguments)
        prediction = self.head_prediction(features)
        output = self.postprocess(
            prediction["pred_logits"][0], prediction["pred_masks"][0], image_size, size
        )
        return output | (self.prior_maps(features, image_size, size) if with_priors else {})

    def predict_queries(self, inputs: Mapping[str, Any], top: int) -> QueryMasks:
        """The predictions of the strongest queries for an image, in any task.

        Args:
            inputs: "image" (3, H, W), 0..255.
            top: how many queries, at most.

        Returns:
            With masks (N, h, w) of the image without padding, at the decoder's resolution.
        """
        image = inputs["image"]
        prediction = self.head_prediction(self.backbone(self._normalized(image)))
        logits, masks = prediction["pred_logits"][0], prediction["pred_masks"][0]
        padded = self.padded_size((image.shape[-2], image.shape[-1]))
        height, width = (
            -(-side * shown // whole)
            for side, shown, whole in zip(masks.shape[-2:], image.shape[-2:], padded, strict=True)
        )
        return strongest_queries(logits, masks[:, :height, :width], top=top)

    def postprocess(
        self, logits: Tensor, masks: Tensor, image_size: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, Any]:
        """The selected outputs, from the queries of one image.

        Args:
            logits: (Q, K + 1).
            masks: (Q, h, w) logits of the padded image.
            image_size: height and width of the image without padding.
            size: of the result.

        Returns:
            See :meth:`predict`.
        """
        masks = resize(masks[None], self.padded_size(image_size))[0]
        masks = crop_and_resize(masks, image_size, size)
        output: dict[str, Any] = {}
        if self.semantic_on:
            output["sem_seg"] = class_scores(logits, masks)
        if self.instance_on:
            found = instance_prediction(
                logits, masks, top=self.detections_per_image, things=self.instance_classes
            )
            output["instances"] = as_instances(
                size, found.classes, found.scores, found.masks, found.boxes
            )
        if self.panoptic_on:
            assert self.panoptic_rule is not None  # as checked
            output["panoptic_seg"] = panoptic_prediction(logits, masks, self.panoptic_rule)
        return output

    @property
    def _network_kind(self) -> ScoreKind:
        return "scores"

    @property
    def instance_classes(self) -> Collection[int] | None:
        """The classes of instances; None = all. With panoptic segments, the things only."""
        if self.panoptic_on and self.panoptic_rule is not None:
            return self.panoptic_rule.things
        return None

    def class_scores(self, features: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Scores (K, *size) from the features of one padded image; ``size`` is without padding."""
        scores = semantic_scores(self.head_prediction(features), self.padded_size(size))[0]
        return crop_and_resize(scores, size, size)

    def prior_maps(
        self, features: Mapping[str, Tensor], image_size: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, Any]:
        """See :meth:`SeMaskSegmentor.prior_maps`; "priors" are without the padding."""
        maps: dict[str, Any] = {"priors": {}}
        for name, stride in self.backbone.prior_strides.items():
            rows, columns = (-(-side // stride) for side in image_size)
            maps["priors"][name] = features[name][0, :, :rows, :columns]
        if self.prior_supervision is not None:
            padded = self.padded_size(image_size)
            prior = resize(self.prior_supervision.decode(features, padded), padded)[0]
            maps["prior"] = crop_and_resize(prior, image_size, size)
        return maps

    def head_prediction(self, features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """{"pred_logits": (B, Q, K + 1), "pred_masks": (B, Q, h, w)}, float32 or better."""
        prediction: Mapping[str, Tensor] = self.sem_seg_head(features)
        return {k: at_least_float32(prediction[k]) for k in ("pred_logits", "pred_masks")}

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width, rounded up to multiples of ``size_divisibility``."""
        height, width = (up_to_multiple(side, self.size_divisibility) for side in size)
        return height, width


def _things(cfg: CfgNode) -> Collection[int] | None:
    """The contiguous ids of the things of the first dataset that has any."""
    for name in [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]:
        if name not in MetadataCatalog.list():  # ``get`` of another name would create an entry
            continue
        metadata = MetadataCatalog.get(name)
        if metadata.get("panoptic_json") and not metadata.get("stuff_classes"):
            with contextlib.suppress(DataError):  # reported where the data are used
                DatasetCatalog.get(name)  # which reads the categories
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        if ids is not None:
            return frozenset(ids.values())
    return None
