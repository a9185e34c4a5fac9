"""The SEM_SEG_HEADS entry of mask classification: a pixel decoder, a mask decoder, their losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor

from semask.errors import ConfigError
from semask.modeling.heads.base import ScoreKind, SegmentationHead
from semask.modeling.heads.prior import PriorSupervision
from semask.modeling.losses.divisor import Divisor
from semask.modeling.losses.mask_losses import (
    Mask2FormerCriterion,
    MaskCriterion,
    MaskFormerCriterion,
)
from semask.modeling.losses.matcher import Mask2FormerMatcher, MaskFormerMatcher, MaskTarget
from semask.modeling.mask_decoder.base import MaskDecoder, MaskPrediction
from semask.modeling.mask_decoder.mask2former import Mask2FormerDecoder
from semask.modeling.mask_decoder.maskformer import MaskFormerDecoder
from semask.modeling.pixel_decoder.base import PixelDecoder
from semask.modeling.pixel_decoder.deformable import DeformablePixelDecoder
from semask.modeling.pixel_decoder.fapn import FaPNPixelDecoder, MSFaPNPixelDecoder
from semask.modeling.pixel_decoder.fpn import FPNPixelDecoder


@SEM_SEG_HEADS_REGISTRY.register()
class MaskClassificationHead(SegmentationHead):
    """MaskFormer, Mask2Former and their variants: Q masks, each with a class.

    Parameters have the names of the published checkpoints.

    Attributes:
        inside_only: see :class:`semask.modeling.mask_decoder.postprocess.PanopticRule`.
    """

    losses_need_values = True
    score_kind: ScoreKind = "scores"

    @configurable
    def __init__(
        self,
        *,
        pixel_decoder: PixelDecoder,
        predictor: MaskDecoder,
        criterion: MaskCriterion,
        memory: str | None = None,
        deep_supervision: bool = True,
        inside_only: bool = True,
        ignore_value: int = 255,
        prior_supervision: PriorSupervision | None = None,
    ) -> None:
        """
        Args:
            pixel_decoder: makes the mask features, and maps that the queries attend to.
            predictor: the mask decoder.
            criterion: the losses of its predictions.
            memory: name of the backbone's feature that the queries attend to instead of these.
            deep_supervision: supervise all decoder layers, not only the last one.
            inside_only: panoptic segments end where the probability of their mask is below 0.5,
                as in Mask2Former.
            ignore_value: label of pixels without a class, in "sem_seg".
            prior_supervision: of the priors; None where the backbone has no semantic layers.
        """
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.criterion = criterion
        self.memory = memory
        self.deep_supervision = deep_supervision
        self.inside_only = inside_only
        self.num_classes = predictor.num_classes
        self.ignore_value = ignore_value
        self.prior_supervision = prior_supervision

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head, semask = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.SEMASK
        name = cfg.MODEL.MASK_FORMER.DECODER
        if name not in DECODERS:
            raise ConfigError(
                f"MODEL.MASK_FORMER.DECODER is '{name}'; set it to one of {', '.join(DECODERS)}."
            )
        missing = [name for name in head.IN_FEATURES if name not in input_shape]
        if missing:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES has {', '.join(missing)}, but the backbone "
                f"returns {', '.join(input_shape)}."
            )
        shapes = {name: input_shape[name] for name in head.IN_FEATURES}
        return {
            **DECODERS[name](cfg, shapes),
            "deep_supervision": cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION,
            "ignore_value": head.IGNORE_VALUE,
            "prior_supervision": PriorSupervision.from_config(
                cfg,
                input_shape,
                # A map painted from instances has one class more, the background.
                num_classes=semask.NUM_CLASSES or head.NUM_CLASSES,
                reduction="valid",
                align_corners=True,
            ),
        }

    def predict(self, features: Mapping[str, Tensor], return_aux: bool = False) -> dict[str, Any]:
        """The prediction of the last decoder layer.

        Args:
            features: of the backbone.
            return_aux: also return those of the earlier layers, as "aux_outputs".

        Returns:
            "pred_logits" (B, Q, K + 1) and "pred_masks" (B, Q, h, w); on request "aux_outputs", a
            list of the same.
        """
        *aux, final = self.decode(features, return_aux)
        output: dict[str, Any] = _as_mapping(final)
        if return_aux:
            output["aux_outputs"] = [_as_mapping(prediction) for prediction in aux]
        return output

    def decode(self, features: Mapping[str, Tensor], return_aux: bool) -> list[MaskPrediction]:
        """The predictions of all decoder layers, the final one last, or the final one alone."""
        mask_features, maps = self.pixel_decoder(features)
        if self.memory is not None:
            maps = [features[self.memory]]
        return self.predictor(maps, mask_features, return_aux)

    def losses(
        self, features: Mapping[str, Tensor], targets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Those of :class:`MaskCriterion` and, where the priors are supervised, "loss_prior".

        Args:
            features: of the backbone, with the priors.
            targets: "instances", for each image ``gt_classes`` (N,) int64 and ``gt_masks``
                (N, H, W) bool of the padded size; and "sem_seg" for the priors.
        """
        goals = _mask_targets(targets)
        losses = self.criterion(self.decode(features, self.deep_supervision), goals)
        return {**losses, **self.prior_losses(features, targets)}

    def loss_divisors(self, targets: Mapping[str, Any]) -> dict[str, Divisor]:
        """See :class:`SegmentationHead`."""
        divisors = self.criterion.divisors(_mask_targets(targets), self.predictor.num_queries)
        return {**divisors, **super().loss_divisors(targets)}

    def forward(
        self,
        features: Mapping[str, Tensor],
        targets: Tensor | Mapping[str, Any] | None = None,
        return_aux: bool = False,
    ) -> Any:
        """Losses in training, predictions in evaluation.

        Args:
            features, targets: see :class:`SegmentationHead`.
            return_aux: in evaluation, see :meth:`predict`.
        """
        if return_aux and not self.training:
            return self.predict(features, return_aux=True)
        return super().forward(features, targets)


def _mask_targets(targets: Mapping[str, Any]) -> list[MaskTarget]:
    return [MaskTarget(each.gt_classes, each.gt_masks) for each in targets["instances"]]


def _as_mapping(prediction: MaskPrediction) -> dict[str, Tensor]:
    return {"pred_logits": prediction.logits, "pred_masks": prediction.masks}


def _maskformer(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
    former = cfg.MODEL.MASK_FORMER
    coarsest = max(input_shape, key=lambda name: input_shape[name].stride or 0)
    return {
        "pixel_decoder": FPNPixelDecoder(input_shape=input_shape, **_pixel_decoder_sizes(cfg)),
        "predictor": MaskFormerDecoder(
            in_channels=input_shape[coarsest].channels or 0,
            num_layers=former.DEC_LAYERS,
            dropout=former.DROPOUT,
            **_mask_decoder_sizes(cfg),
        ),
        "criterion": MaskFormerCriterion(
            matcher=MaskFormerMatcher(**_loss_weights(cfg)),
            no_object_weight=former.NO_OBJECT_WEIGHT,
            **_loss_weights(cfg),
        ),
        "memory": coarsest,
        "inside_only": False,
    }


@dataclass(frozen=True)
class _Mask2Former:
    """A pixel decoder, followed by Mask2Former's mask decoder and losses."""

    pixel_decoder: Callable[..., PixelDecoder]
    has_transformer: bool

    def __call__(self, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        transformer = {"num_layers": head.TRANSFORMER_ENC_LAYERS, "dropout": former.DROPOUT}
        return {
            "pixel_decoder": self.pixel_decoder(
                input_shape=input_shape,
                **_pixel_decoder_sizes(cfg),
                **(transformer if self.has_transformer else {}),
            ),
            "predictor": Mask2FormerDecoder(
                num_layers=former.DEC_LAYERS - 1, **_mask_decoder_sizes(cfg)
            ),
            "criterion": Mask2FormerCriterion(
                matcher=Mask2FormerMatcher(
                    num_points=former.TRAIN_NUM_POINTS, **_loss_weights(cfg)
                ),
                no_object_weight=former.NO_OBJECT_WEIGHT,
                num_points=former.TRAIN_NUM_POINTS,
                oversample_ratio=former.OVERSAMPLE_RATIO,
                importance_sample_ratio=former.IMPORTANCE_SAMPLE_RATIO,
                **_loss_weights(cfg),
            ),
        }


# From a config and the features' shapes to arguments of the head.
DecoderBuilder = Callable[[CfgNode, Mapping[str, ShapeSpec]], dict[str, Any]]

# The values of MODEL.MASK_FORMER.DECODER; register_decoder adds to them.
DECODERS: dict[str, DecoderBuilder] = {
    "maskformer": _maskformer,
    "mask2former": _Mask2Former(DeformablePixelDecoder, has_transformer=True),
    "mask2former_fapn": _Mask2Former(FaPNPixelDecoder, has_transformer=False),
    "mask2former_msfapn": _Mask2Former(MSFaPNPixelDecoder, has_transformer=True),
}


def register_decoder(name: str) -> Callable[[DecoderBuilder], DecoderBuilder]:
    """A decorator that registers a decoder as a value of ``MODEL.MASK_FORMER.DECODER``.

    Args:
        name: the value.

    Raises:
        ValueError: the name is taken.
    """

    def enter(build: DecoderBuilder) -> DecoderBuilder:
        if name in DECODERS:
            raise ValueError(f"A mask decoder '{name}' is already registered.")
        DECODERS[name] = build
        return build

    return enter


def _pixel_decoder_sizes(cfg: CfgNode) -> dict[str, Any]:
    head = cfg.MODEL.SEM_SEG_HEAD
    return {"channels": head.CONVS_DIM, "mask_channels": head.MASK_DIM, "norm": head.NORM}


def _mask_decoder_sizes(cfg: CfgNode) -> dict[str, Any]:
    head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    return {
        "num_classes": head.NUM_CLASSES,
        "num_queries": former.NUM_OBJECT_QUERIES,
        "dim": former.HIDDEN_DIM,
        "num_heads": former.NHEADS,
        "feedforward_dim": former.DIM_FEEDFORWARD,
        "mask_dim": head.MASK_DIM,
    }


def _loss_weights(cfg: CfgNode) -> dict[str, float]:
    former = cfg.MODEL.MASK_FORMER
    return {
        "class_weight": former.CLASS_WEIGHT,
        "mask_weight": former.MASK_WEIGHT,
        "dice_weight": former.DICE_WEIGHT,
    }
