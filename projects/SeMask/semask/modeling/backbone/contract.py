"""The contracts of an encoder and of a backbone: what SeMask needs, and what heads get.

An encoder is a stem and stages; any hierarchical network fits: a Swin transformer, a ConvNet, the
families of timm. A backbone is an encoder with semantic layers.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from semask.errors import ConfigError

ATTENTION_KINDS = ("window", "global", "none")

# How the dimensions of an encoder's maps are ordered.
Layout = Literal["NHWC", "NCHW"]


class HierarchicalEncoder(nn.Module):
    """A network that is run stage by stage.

    ``x = stem(image)``, then ``x = stages[0](x)``, ``x = stages[1](x)`` and so on. The
    caller may change ``x`` in between. SeMask does: the output of a stage's semantic layer is the
    input of the next stage. Therefore the downsampling between two stages belongs to the later
    one, in front of its blocks.

    Attributes:
        stem: from an image (B, 3, H, W), of any H and W of at least 1, to a map.
        stages: from a map to a map; that of stage i has ``channels[i]`` channels, and
            ceil(H / ``strides[i]``) rows and ceil(W / ``strides[i]``) columns.
        channels: of each stage's output.
        strides: pixels of the image per position of each stage's output, along one side.
        layout: of all maps, "NHWC" (B, H, W, C) or "NCHW" (B, C, H, W).
        pretrained: whether it was built with pre-trained weights.
        weights_advice: how a user gives it pre-trained weights, for messages.
    """

    stem: nn.Module
    stages: nn.ModuleList
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    layout: Layout
    pretrained: bool = False
    weights_advice: str = "set MODEL.WEIGHTS to a checkpoint of the encoder"

    def frozen_parts(self, num_stages: int) -> list[nn.Module]:
        """The modules to freeze: the stem and the first stages.

        Args:
            num_stages: how many stages are frozen; 0 = the stem alone.

        Returns:
            Modules whose parameters and statistics stay fixed.
        """
        return [self.stem, *self.stages[:num_stages]]


def to_nhwc(x: Tensor, layout: Layout) -> Tensor:
    """A map of this layout as (B, H, W, C)."""
    return x if layout == "NHWC" else x.permute(0, 2, 3, 1)


def from_nhwc(x: Tensor, layout: Layout) -> Tensor:
    """A map (B, H, W, C) in this layout."""
    return x if layout == "NHWC" else x.permute(0, 3, 1, 2)


def stage_name(stage: int) -> str:
    """Detectron2's name of the features of ``stage`` (0-based): "res2" for stage 0."""
    return f"res{stage + 2}"


def prior_name(stage: int) -> str:
    """Name of the semantic-prior map of ``stage`` (0-based): "prior2" for stage 0."""
    return f"prior{stage + 2}"


def stage_of_prior(name: str) -> int | None:
    """The stage of :func:`prior_name`; None for other names."""
    number = name.removeprefix("prior")
    return int(number) - 2 if number != name and number.isdecimal() else None


def num_stages_for(out_features: Sequence[str], num_stages: int) -> int:
    """The number of stages to build for these features.

    Args:
        out_features: their names, "res2" and so on.
        num_stages: that the backbone can have.

    Raises:
        ConfigError: no feature is named, or one does not exist.
    """
    names = [stage_name(stage) for stage in range(num_stages)]
    if not out_features or any(name not in names for name in out_features):
        raise ConfigError(
            f"OUT_FEATURES of the backbone is {list(out_features)}; it must name one or more of "
            f"{names}."
        )
    return 1 + max(names.index(name) for name in out_features)


def has_semantic_layer(attention: str, num_blocks: int) -> bool:
    """Whether a stage with these two settings has a semantic layer."""
    return attention != "none" and num_blocks > 0


class FeatureShapes(dict[str, ShapeSpec]):
    """A backbone's ``output_shape()``, with the strides of its prior maps.

    It is all that Detectron2 tells a head about the backbone.

    Attributes:
        prior_strides: see :attr:`SemSegBackbone.prior_strides`.
    """

    def __init__(self, shapes: Mapping[str, ShapeSpec], prior_strides: Mapping[str, int]) -> None:
        """
        Args:
            shapes: channels and stride of each feature, by name.
            prior_strides: of the prior maps, by name.
        """
        super().__init__(shapes)
        self.prior_strides = dict(prior_strides)


def prior_strides(
    shapes: Mapping[str, ShapeSpec], attention: Sequence[str], num_blocks: Sequence[int]
) -> dict[str, int]:
    """Strides of the prior maps of the backbone that gives features of these shapes.

    Args:
        shapes: its ``output_shape()``. Where that is no :class:`FeatureShapes`, the settings tell
            which stages have a prior map. It has the stride of the stage's feature; of a stage
            without one in ``shapes``, 4, 8, 16 and so on, up to the largest stride in ``shapes``.
        attention: "window", "global" or "none" for each stage.
        num_blocks: semantic attention blocks of each stage.

    Returns:
        {"prior2": 4, ...}, one entry for each stage that has a semantic layer.
    """
    if isinstance(shapes, FeatureShapes):
        return dict(shapes.prior_strides)
    largest = max((shape.stride or 0 for shape in shapes.values()), default=0)
    strides = {}
    for stage, settings in enumerate(zip(attention, num_blocks, strict=True)):
        feature = shapes.get(stage_name(stage))
        stride = 4 * 2**stage if feature is None else feature.stride or 0
        if has_semantic_layer(*settings) and stride <= largest:
            strides[prior_name(stage)] = stride
    return strides


class SemSegBackbone(Backbone):
    """A Detectron2 backbone that also predicts semantic-prior maps.

    ``forward`` returns **one plain dictionary**: the features that ``output_shape()`` describes
    ("res2".. "res5") and, in training or on request, the semantic-prior maps
    ("prior2".. "prior5", K logits per token, of the stages that have a semantic layer).

    Why one dictionary: every consumer in Detectron2 (``SemanticSegmentor``, ``FPN``, the R-CNN
    heads) passes the backbone's dictionary on and picks features from it by name, so the priors
    reach a head that knows them and are invisible to one that does not; none of them has to be
    changed, and no state is kept on the module, which would break under checkpointing,
    ``torch.compile`` or a second forward pass. ``output_shape()`` lists the features only,
    because the priors are no input of a decoder and are absent in evaluation.
    """

    #: classes K of the prior maps; 0 where no stage has a semantic layer
    num_semantic_classes: int = 0

    @property
    def prior_strides(self) -> dict[str, int]:
        """Stride of each prior map that the backbone can return: ``{"prior2": 4, ...}``.

        Where a backbone with prior maps does not override it, ``MODEL.SEMASK`` tells them; see
        :func:`semask.modeling.backbone.contract.prior_strides`.
        """
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature, by name, and the strides of the prior maps, where
        they are known (:class:`FeatureShapes`).
        """
        shapes: dict[str, ShapeSpec] = super().output_shape()
        unknown = self.num_semantic_classes > 0 and not self.prior_strides
        return shapes if unknown else FeatureShapes(shapes, self.prior_strides)

    @abstractmethod
    def forward(self, image: Tensor, return_priors: bool | None = None) -> dict[str, Tensor]:
        """Features and, on request, semantic-prior maps of a batch of images.

        Args:
            image: (B, 3, H, W), normalised; any H and W of at least 1.
            return_priors: whether the prior maps are returned; None = in training only.

        Returns:
            {"res{i}": (B, C_i, ceil(H / s_i), ceil(W / s_i))} for the features of
            ``output_shape()``, and {"prior{i}": (B, K, ...)} of the same height and width.
        """
