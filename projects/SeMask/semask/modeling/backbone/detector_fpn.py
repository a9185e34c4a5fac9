"""Detectron2's feature pyramid on a SeMask backbone, for its detectors (arXiv 1612.03144).

``MODEL.BACKBONE.NAME`` "build_semask_swin_fpn_backbone" is what R-CNN models take,
"build_retinanet_semask_swin_fpn_backbone" what RetinaNet takes; with "timm" in place of "swin" the
encoder is that of ``MODEL.TIMM``. Parameters have Detectron2's names: ``backbone.bottom_up.*``,
``backbone.fpn_lateral2.*`` and so on.
"""

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from semask.modeling.architecture import prior_classes
from semask.modeling.backbone.contract import FeatureShapes, SemSegBackbone
from semask.modeling.backbone.semask import SeMaskBackbone
from semask.modeling.backbone.semask_swin import SeMaskSwin
from semask.modeling.backbone.semask_timm import SeMaskTimm


class PyramidBackbone(SeMaskBackbone):
    """A :class:`SeMaskBackbone` that also accepts its own output, which it returns unchanged."""

    def forward(
        self, image: Tensor | Mapping[str, Tensor], return_priors: bool | None = None
    ) -> dict[str, Tensor]:
        """See :meth:`SemSegBackbone.forward`; a dictionary instead of an image is returned
        unchanged.
        """
        return dict(image) if isinstance(image, Mapping) else super().forward(image, return_priors)


class PyramidSwin(PyramidBackbone, SeMaskSwin):
    """Swin."""


class PyramidTimm(PyramidBackbone, SeMaskTimm):
    """A network of timm."""


class PriorFPN(FPN, SemSegBackbone):
    """Detectron2's FPN, with the semantic-prior maps of its backbone in the output.

    ``output_shape()`` lists the levels of the pyramid alone. Detectron2's heads pick these by
    name from the dictionary and do not see the priors; see :class:`SemSegBackbone`.
    """

    def __init__(
        self,
        bottom_up: PyramidBackbone,
        in_features: list[str],
        out_channels: int,
        norm: str = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
    ) -> None:
        """
        Args:
            bottom_up: computes the features, and the priors.
            in_features: names of the features below, from high to low resolution.
            out_channels: of each level.
            norm: Detectron2's name of the convolutions' normalisation; "" = none.
            top_block: makes further levels.
            fuse_type: "sum" or "avg".
        """
        super().__init__(bottom_up, in_features, out_channels, norm, top_block, fuse_type)
        self.num_semantic_classes = bottom_up.num_semantic_classes

    @property
    def prior_strides(self) -> dict[str, int]:
        """See :attr:`SemSegBackbone.prior_strides`."""
        bottom_up: PyramidBackbone = self.bottom_up
        return bottom_up.prior_strides

    def output_shape(self) -> FeatureShapes:
        """See :meth:`SemSegBackbone.output_shape`."""
        return FeatureShapes(FPN.output_shape(self), self.prior_strides)

    def forward(self, image: Tensor, return_priors: bool | None = None) -> dict[str, Tensor]:
        """Levels of the pyramid and, on request, semantic-prior maps.

        Args:
            image: (B, 3, H, W), normalised; H and W multiples of ``size_divisibility``.
            return_priors: whether the prior maps are returned; None = in training only.

        Returns:
            {"p2": (B, C, H / 4, W / 4), ...} and {"prior2": (B, K, H / 4, W / 4), ...}.
        """
        features = self.bottom_up(image, return_priors)
        # FPN asks ``bottom_up`` for features itself, and gets these.
        levels = FPN.forward(self, features)
        priors = {name: features[name] for name in self.prior_strides if name in features}
        return {**levels, **priors}


@BACKBONE_REGISTRY.register()
def build_semask_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PriorFPN:
    """Levels p2..p6, the last one by max pooling, as R-CNN models with FPN have them.

    Raises:
        ConfigError: see :func:`prior_classes`.
    """
    return _rcnn_pyramid(cfg, _bottom_up(PyramidSwin, cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_semask_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PriorFPN:
    """The same levels from a network of timm.

    Raises:
        ConfigError: see :func:`prior_classes`.
    """
    return _rcnn_pyramid(cfg, _bottom_up(PyramidTimm, cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_semask_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PriorFPN:
    """Levels p3..p7, the last two by convolutions from res5, as RetinaNet has them.

    Raises:
        ConfigError: see :func:`prior_classes`.
    """
    return _retinanet_pyramid(cfg, _bottom_up(PyramidSwin, cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_semask_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PriorFPN:
    """The same levels from a network of timm.

    Raises:
        ConfigError: see :func:`prior_classes`.
    """
    return _retinanet_pyramid(cfg, _bottom_up(PyramidTimm, cfg, input_shape))


def _bottom_up(
    kind: type[PyramidSwin] | type[PyramidTimm], cfg: CfgNode, input_shape: ShapeSpec
) -> PyramidBackbone:
    arguments = kind.from_config(cfg, input_shape)
    features = list(cfg.MODEL.FPN.IN_FEATURES)
    # A stage that the pyramid does not use would get an output norm without a gradient.
    return kind(**{**arguments, "semantic_classes": prior_classes(cfg), "out_features": features})


def _rcnn_pyramid(cfg: CfgNode, bottom_up: PyramidBackbone) -> PriorFPN:
    return _pyramid(cfg, bottom_up, LastLevelMaxPool())


def _retinanet_pyramid(cfg: CfgNode, bottom_up: PyramidBackbone) -> PriorFPN:
    channels = bottom_up.output_shape()["res5"].channels
    return _pyramid(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _pyramid(cfg: CfgNode, bottom_up: PyramidBackbone, top_block: nn.Module) -> PriorFPN:
    fpn = cfg.MODEL.FPN
    return PriorFPN(
        bottom_up,
        list(fpn.IN_FEATURES),
        fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=top_block,
        fuse_type=fpn.FUSE_TYPE,
    )
