"""Modules on maps that are zero-padded to a size that they can take."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from semask.modeling.backbone.contract import Layout
from semask.modeling.layers.resize import up_to_multiple


class PaddedSequence(nn.Module):
    """Modules in a row, on a map that is zero-padded to a multiple of some number.

    Args:
        modules: in order.
        multiple: of the height and width.
        layout: of the map.
        least: the smallest height and width that the modules can take.
        output_layout: of the map that they give; None = ``layout``.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        multiple: int,
        layout: Layout,
        least: int = 1,
        output_layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.multiple = multiple
        self.layout = layout
        self.least = least
        self.output_layout = output_layout or layout

    def forward(self, x: Tensor) -> Tensor:
        """A map in ``layout``, (B, H, W, C) or (B, C, H, W), to the output of the last module."""
        height, width = map_size(x, self.layout)
        x = pad_map(x, self.multiple, self.layout, self.least)
        for part in self.parts:
            x = part(x)
        if height >= self.least and width >= self.least:
            return x
        rows, columns = (-(-side // self.multiple) for side in (height, width))
        is_nhwc = self.output_layout == "NHWC"
        return x[:, :rows, :columns] if is_nhwc else x[..., :rows, :columns]


def map_size(x: Tensor, layout: Layout) -> tuple[int, int]:
    """Height and width of a map of this layout."""
    return (x.shape[1], x.shape[2]) if layout == "NHWC" else (x.shape[2], x.shape[3])


def pad_map(x: Tensor, multiple: int, layout: Layout, least: int = 1) -> Tensor:
    """A map, zero-padded right and below.

    Args:
        x: of this layout.
        multiple: of the height and width of the result, where they are not ``least``.
        layout: of the map.
        least: the height or width of the result where the map's is smaller.
    """
    if multiple == least == 1:
        return x
    height, width = map_size(x, layout)
    rows, columns = (
        least if side < least else up_to_multiple(side, multiple) for side in (height, width)
    )
    channels = (0, 0) if layout == "NHWC" else ()
    return F.pad(x, (*channels, 0, columns - width, 0, rows - height))
