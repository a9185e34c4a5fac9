"""The contract of an encoder that can have semantic layers: a stem, and stages.

Any hierarchical network fits: a Swin transformer, a ConvNet, the families of timm.
"""

from typing import Literal

from torch import Tensor, nn

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
