"""Bilinear resizing, a stripe of rows at a time, without the whole result in memory.

Each row of the result depends on two source rows only, in whatever stripe it is computed. Values
are (rows, columns, K): the K classes of a pixel are contiguous.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from semask.modeling.layers.resize import resize

# Bytes of resized values in a stripe: on the CPU they stay in the cache; a GPU needs few calls.
STRIPE_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


def stripes(height: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Cut rows into stripes of about ``STRIPE_BYTES``, of one row at least.

    Args:
        height: number of rows.
        row_bytes: of one of them.
        device: where they are computed.
    """
    budget = STRIPE_BYTES.get(device.type, STRIPE_BYTES["cuda"])
    rows = max(1, budget // row_bytes)
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


class RowResize:
    """Bilinear resizing of any of the rows of a result."""

    def __init__(
        self,
        source: Sequence[int],
        size: Sequence[int],
        device: torch.device,
        *,
        align_corners: bool = False,
    ) -> None:
        """
        Args:
            source: (h, w) of the source.
            size: (H, W) of the result.
            device: of the source.
            align_corners: see ``torch.nn.functional.interpolate``.
        """
        self.height, self.width = size
        self._same_rows = source[0] == self.height
        self._same_columns = source[1] == self.width
        self._align_corners = align_corners
        # The two source rows of each row.
        row = torch.arange(self.height, dtype=torch.float64, device="cpu")
        if align_corners:
            row = row * ((source[0] - 1) / max(1, self.height - 1))
        else:
            row = ((row + 0.5) * (source[0] / self.height) - 0.5).clamp_(min=0)
        upper = row.floor().long().clamp_(max=source[0] - 1)  # rounding may give one too many
        lower = (upper + 1).clamp_(max=source[0] - 1)
        self._ends = upper, lower + 1  # on the CPU, as they are read
        self._upper, self._lower = upper.to(device), lower.to(device)
        self._fraction = (row - upper).to(device)

    def source(self, rows: slice) -> slice:
        """The source rows that some rows of the result depend on."""
        if self._same_rows:
            return rows
        first, end = self._ends
        return slice(int(first[rows.start]), int(end[rows.stop - 1]))

    def down(self, part: Tensor, rows: slice) -> Tensor:
        """The rows alone: source rows (r, w, K) to (R, w, K)."""
        if self._same_rows:
            return part
        first = self.source(rows).start
        upper = part.index_select(0, self._upper[rows] - first)
        lower = part.index_select(0, self._lower[rows] - first)
        return upper.lerp_(lower, self._fraction[rows, None, None].to(part.dtype))

    def across(self, part: Tensor) -> Tensor:
        """The columns alone: (R, w, K) to (R, W, K)."""
        if self._same_columns:
            return part
        # Rows as a batch of images of height 1: the library's own operation.
        lines = part.transpose(1, 2).unsqueeze(2)
        wide = resize(lines, (1, self.width), align_corners=self._align_corners)
        return wide.squeeze(2).transpose(1, 2)


class Rows(ABC):
    """Values (H, W, K) that are computed for any range of rows.

    Attributes:
        size: (H, W).
        num_classes: K.
        dtype: of the values; intermediate results are float32 or better.
        device: where they are computed.
        in_stripes: whether all rows at once would need much more memory than the values.
    """

    in_stripes: bool = False
    size: tuple[int, int]
    num_classes: int
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, rows: slice) -> Tensor:
        """(R, W, K), R > 0 rows; start and stop of the slice are given and lie inside."""
        return self.across(self.down(rows))

    @abstractmethod
    def down(self, rows: slice) -> Tensor:
        """(R, w, K), the input of ``across``."""

    def across(self, part: Tensor) -> Tensor:
        """(R, w, K) to (R, W, K)."""
        return part


class MapRows(Rows):
    """The rows of a map (K, H, W)."""

    def __init__(self, maps: Tensor) -> None:
        """
        Args:
            maps: (K, H, W); it is not copied.
        """
        self.num_classes, *size = maps.shape
        self.size = (size[0], size[1])
        self.dtype, self.device = maps.dtype, maps.device
        self._maps = maps.permute(1, 2, 0)

    def down(self, rows: slice) -> Tensor:
        """See :class:`Rows`."""
        part = self._maps[rows]
        exact = part.is_floating_point() and part.dtype.itemsize >= 4
        return part if exact else part.float()


class ResizedRows(Rows):
    """Other rows, resized bilinearly (``align_corners=False``)."""

    def __init__(self, source: Rows, size: tuple[int, int]) -> None:
        """
        Args:
            source: the other rows.
            size: (H, W) of the result.
        """
        self.size = size
        self.num_classes, self.dtype, self.device = source.num_classes, source.dtype, source.device
        self.in_stripes = source.in_stripes
        self._source = source
        self._resize = RowResize(source.size, size, source.device)

    # Rows and columns are resized separately and so in any order: with several resizings in a row,
    # all rows come first, while they are short.

    def down(self, rows: slice) -> Tensor:
        """See :class:`Rows`."""
        return self._resize.down(self._source.down(self._resize.source(rows)), rows)

    def across(self, part: Tensor) -> Tensor:
        """See :class:`Rows`."""
        return self._resize.across(self._source.across(part))


def resized(rows: Rows, *sizes: Sequence[int]) -> Rows:
    """Resize to one size after the other; steps that change nothing are left out."""
    for height, width in sizes:
        if rows.size != (height, width):
            rows = ResizedRows(rows, (height, width))
    return rows
