"""Class scores of an image, kept at a low resolution and up-sampled on demand."""

from collections.abc import Iterator

import torch
from torch import Tensor

from semask.modeling.heads.base import ScoreKind
from semask.ops.stripes import MapRows, Rows, stripes


class LazyScores:
    """A score of each of K classes at each pixel of an image of height H and width W.

    :meth:`full` returns all K * H * W numbers. The other methods iterate over stripes of rows, and
    their memory does not depend on the image's size. The values are the same: each row depends on
    its neighbours in the low-resolution map only.

    Attributes:
        size: (H, W).
        num_classes: K.
        device: where they are computed.
        kind: "logits", "probabilities", or "scores", which are neither.
    """

    def __init__(self, rows: Rows, kind: ScoreKind) -> None:
        """
        Args:
            rows: computes any rows of the scores.
            kind: see the attribute.
        """
        self.size = rows.size
        self.num_classes = rows.num_classes
        self.device = rows.device
        self.kind = kind
        self._rows = rows

    def stripes(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows from the first to the last, and their scores (rows, W, K), float32 or better."""
        itemsize = max(4, self._rows.dtype.itemsize)
        row_bytes = self.size[1] * self.num_classes * itemsize
        for rows in stripes(self.size[0], row_bytes, self.device):
            yield rows, self._rows[rows]

    def full(self) -> Tensor:
        """All scores, (K, H, W)."""
        if self._rows.in_stripes:
            return self._gathered(self.stripes())
        rows = self._rows[slice(0, self.size[0])]
        return rows.to(self._rows.dtype).permute(2, 0, 1)

    def probabilities(self) -> Tensor:
        """All scores as probabilities, (K, H, W); "scores" are divided by their sum."""
        return self._gathered((rows, self._as_probabilities(part)) for rows, part in self.stripes())

    def labels(self) -> Tensor:
        """The class with the highest score at each pixel, (H, W) int64."""
        labels = torch.empty(self.size, dtype=torch.int64, device=self.device)
        for rows, part in self.stripes():
            labels[rows] = part.max(dim=-1).indices  # faster than argmax, and the same
        return labels

    def labels_and_confidence(self) -> tuple[Tensor, Tensor]:
        """As :meth:`labels`, and the probability of that class, (H, W) float32, in one pass."""
        labels = torch.empty(self.size, dtype=torch.int64, device=self.device)
        confidence = torch.empty(self.size, dtype=torch.float32, device=self.device)
        for rows, part in self.stripes():
            labels[rows] = part.max(dim=-1).indices
            confidence[rows] = self._as_probabilities(part).amax(dim=-1).float()
        return labels, confidence

    def _as_probabilities(self, part: Tensor) -> Tensor:
        if self.kind == "logits":
            return part.softmax(dim=-1)
        if self.kind == "scores":
            return part / part.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)
        return part

    def _gathered(self, parts: Iterator[tuple[slice, Tensor]]) -> Tensor:
        full: Tensor | None = None
        for rows, part in parts:
            part = part.to(self._rows.dtype)
            if full is None:
                whole = (*self.size, self.num_classes)
                full = part if part.shape == whole else part.new_empty(whole)
            if full is not part:
                full[rows] = part
        assert full is not None  # an image has a row
        return full.permute(2, 0, 1)


def lazy(scores: Tensor | LazyScores, kind: ScoreKind) -> LazyScores:
    """One interface for what models return: a tensor of all scores, or scores on demand.

    Args:
        scores: (K, H, W), or lazy ones, which are returned as they are.
        kind: of the scores in a tensor.
    """
    return scores if isinstance(scores, LazyScores) else LazyScores(MapRows(scores), kind)
