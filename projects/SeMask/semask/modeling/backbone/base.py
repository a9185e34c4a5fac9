"""The contract between a backbone with semantic layers and the heads that follow it."""

from abc import abstractmethod
from collections.abc import Sequence

from detectron2.modeling import Backbone
from torch import Tensor

from semask.errors import ConfigError

ATTENTION_KINDS = ("window", "global", "none")


def stage_name(stage: int) -> str:
    """Detectron2's name of the features of ``stage`` (0-based): "res2" for stage 0, stride 4."""
    return f"res{stage + 2}"


def prior_name(stage: int) -> str:
    """Name of the semantic-prior map of ``stage`` (0-based): "prior2" for stage 0, stride 4."""
    return f"prior{stage + 2}"


def stage_stride(stage: int) -> int:
    """Pixels of the input per token of ``stage`` (0-based), along one side."""
    return 4 * 2**stage


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


def prior_strides(attention: Sequence[str], num_blocks: Sequence[int]) -> dict[str, int]:
    """Strides of the prior maps that a backbone with these per-stage settings returns.

    Args:
        attention: "window", "global" or "none" for each stage.
        num_blocks: semantic attention blocks of each stage.

    Returns:
        ``{"prior2": 4, ...}``, one entry for each stage that has a semantic layer.
    """
    return {
        prior_name(stage): stage_stride(stage)
        for stage, settings in enumerate(zip(attention, num_blocks, strict=True))
        if has_semantic_layer(*settings)
    }


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
        """Stride of each prior map that the backbone can return: ``{"prior2": 4, ...}``."""
        return {}

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
