"""The supervision of the semantic-prior maps, in training only (arXiv 2112.12782, section 3)."""

import math
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.backbone.contract import SemSegBackbone, prior_strides
from semask.modeling.layers.resize import resize, upsample_2x
from semask.modeling.losses.cross_entropy import SegmentationLoss


class SemanticPriorDecoder(nn.Module):
    """Up-sample each stage's prior map to the common stride and sum them (section 3.3).

    It has no parameters.
    """

    def __init__(
        self, *, strides: Mapping[str, int], common_stride: int = 4, align_corners: bool = False
    ) -> None:
        """
        Args:
            strides: stride of each prior map, by name, e.g. ``{"prior2": 4, "prior3": 8}``.
            common_stride: stride of the output.
            align_corners: of the bilinear up-sampling; the published FPN models have False, the
                published mask-classification models True.
        """
        super().__init__()
        self.strides = dict(strides)
        self.common_stride = common_stride
        self.align_corners = align_corners

    def forward(self, priors: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Prior logits at the common stride.

        Args:
            priors: {name: (B, K, h, w)}; other entries are ignored.
            size: height and width of the output, in tokens of the common stride.

        Returns:
            (B, K, *size).

        Raises:
            ValueError: a prior map is missing.
        """
        missing = [name for name in self.strides if name not in priors]
        if missing:
            raise ValueError(
                f"The backbone returned no {', '.join(missing)}; it returned {', '.join(priors)}. "
                "Priors are returned in training, or with return_priors=True, by the stages "
                "whose MODEL.SEMASK.ATTENTION is not 'none'"
            )
        total: Tensor | None = None
        for name, stride in self.strides.items():
            prior = priors[name]
            # One step of x8 would give other values than three of x2.
            for _ in range(max(0, int(math.log2(stride / self.common_stride)))):
                prior = upsample_2x(prior, align_corners=self.align_corners)
            prior = resize(prior, size, align_corners=self.align_corners)
            total = prior if total is None else total + prior
        assert total is not None, "there is at least one prior map"
        return total


# Entry of a model's input: (H, W) int64, the class that the priors should predict at each pixel of
# "image", or the ignore value.
PRIOR_TARGET = "prior_target"


class PriorSupervision(nn.Module):
    """The cross entropy of the decoded prior maps, weighted (section 3.4).

    Semantic heads, detectors and mask classification all use it. It has no parameters.
    """

    def __init__(
        self,
        *,
        strides: Mapping[str, int],
        num_classes: int,
        weight: float,
        ignore_value: int = 255,
        reduction: str = "all",
        common_stride: int = 4,
        align_corners: bool = False,
    ) -> None:
        """
        Args:
            strides: stride of each prior map, by name, see ``SemSegBackbone.prior_strides``.
            num_classes: K, of the maps and of the labels.
            weight: of the loss, positive; the paper's is the default of
                ``MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT``.
            ignore_value: label of pixels without a loss.
            reduction: "all" or "valid", see :class:`SegmentationLoss`.
            common_stride: of the decoded map.
            align_corners: see :class:`SemanticPriorDecoder`.
        """
        super().__init__()
        self.decoder = SemanticPriorDecoder(
            strides=strides, common_stride=common_stride, align_corners=align_corners
        )
        self.loss = SegmentationLoss(
            ignore_value=ignore_value, reduction=reduction, align_corners=align_corners
        )
        self.num_classes = num_classes
        self.weight = weight
        self.ignore_value = ignore_value

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        shapes: Mapping[str, ShapeSpec],
        num_classes: int,
        *,
        reduction: str | None = None,
        align_corners: bool = False,
    ) -> "PriorSupervision | None":
        """Built from ``MODEL.SEM_SEG_HEAD``: weight, ignore value, reduction and stride.

        Args:
            cfg: of the model.
            shapes: the backbone's ``output_shape()``, see :func:`prior_strides`.
            num_classes, align_corners: see the constructor.
            reduction: None = ``MODEL.SEM_SEG_HEAD.LOSS_REDUCTION``.

        Returns:
            None where there are no prior maps, or the weight is 0.

        Raises:
            ConfigError: the backbone's prior maps have another number of classes.
        """
        head, semask = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.SEMASK
        strides = prior_strides(shapes, semask.ATTENTION, semask.NUM_BLOCKS)
        if not strides or head.PRIOR_LOSS_WEIGHT <= 0:
            return None
        in_maps = semask.NUM_CLASSES or num_classes
        if in_maps != num_classes:
            raise ConfigError(
                f"The prior maps have {in_maps} classes (MODEL.SEMASK.NUM_CLASSES) and their "
                f"labels {num_classes}. Leave MODEL.SEMASK.NUM_CLASSES at 0 to follow."
            )
        return cls(
            strides=strides,
            num_classes=num_classes,
            weight=head.PRIOR_LOSS_WEIGHT,
            ignore_value=head.IGNORE_VALUE,
            reduction=reduction or head.LOSS_REDUCTION,
            common_stride=head.COMMON_STRIDE,
            align_corners=align_corners,
        )

    def check_backbone(self, backbone: nn.Module) -> None:
        """Refuse a backbone whose prior maps do not fit the labels.

        Raises:
            ConfigError: it has no prior maps, or they have another number of classes, or another
                stride where the backbone tells it.
        """
        classes = getattr(backbone, "num_semantic_classes", 0)
        if not isinstance(backbone, SemSegBackbone) or classes != self.num_classes:
            raise ConfigError(
                f"The labels of the prior maps have {self.num_classes} classes, but the prior maps "
                f"of the backbone {type(backbone).__name__} have {classes} "
                "(MODEL.SEMASK.NUM_CLASSES)."
            )
        actual = backbone.prior_strides
        if actual and any(
            actual.get(name) != stride for name, stride in self.decoder.strides.items()
        ):
            raise ConfigError(
                f"The head expects prior maps with the strides {self.decoder.strides}, but those "
                f"of the backbone {type(backbone).__name__} are {actual} "
                "(MODEL.SEMASK.ATTENTION, MODEL.SEMASK.NUM_BLOCKS)."
            )

    def decode(self, priors: Mapping[str, Tensor], image_size: tuple[int, int]) -> Tensor:
        """Prior logits at the common stride.

        Args:
            priors: {"prior2": (B, K, h, w), ...}; other entries are ignored.
            image_size: height and width of the images in the batch, with their padding.

        Returns:
            (B, K, ceil(H / 4), ceil(W / 4)) for a common stride of 4.
        """
        height, width = (-(-side // self.decoder.common_stride) for side in image_size)
        return self.decoder(priors, (height, width))

    def forward(self, priors: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The weighted loss of a batch.

        Args:
            priors: {"prior2": (B, K, h, w), ...}; other entries are ignored.
            targets: (B, H, W) int64 in 0..K-1, or the ignore value; H and W are those of the
                images in the batch, with their padding.

        Returns:
            A scalar; 0 where all pixels are ignored.
        """
        decoded = self.decode(priors, (targets.shape[-2], targets.shape[-1]))
        return self.weight * self.loss(decoded, targets)
