"""What a model says about an image, held at a low resolution and computed where it is needed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from semask.ops.stripes import MapRows, Rows, stripes


class Scores:
    """A score of each of K classes at each pixel of an image of height H and width W.

    All of them are K * H * W numbers, which few need: :meth:`full`. The others go through them a
    stripe of rows at a time, and the memory they take does not depend on the image's size. Both
    compute the same: each row is made of its neighbours in the low-resolution logits alone.

    Attributes:
        size: (H, W).
        num_classes: K.
        device: where they are computed.
        are_probabilities: whether they are probabilities; otherwise they are logits.
    """

    def __init__(self, rows: Rows, *, are_probabilities: bool = False) -> None:
        """
        Args:
            rows: the scores, of which any rows can be had.
            are_probabilities: whether they are probabilities.
        """
        self.size = rows.size
        self.num_classes = rows.num_classes
        self.device = rows.device
        self.are_probabilities = are_probabilities
        self._rows = rows

    @classmethod
    def of(cls, scores: Tensor) -> "Scores":
        """Scores that are there in full, as Detectron2's own models return them.

        Args:
            scores: (K, H, W) logits, or probabilities, which are recognised by being at least 0
                and adding up to 1.
        """
        first = scores[:, 0].float()
        known = bool((first >= 0).all() and ((first.sum(dim=0) - 1).abs() < 1e-3).all())
        return cls(MapRows(scores), are_probabilities=known)

    def stripes(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows from the first to the last, and their scores (rows, W, K), float32 or better."""
        itemsize = max(4, self._rows.dtype.itemsize)
        row_bytes = self.size[1] * self.num_classes * itemsize
        for rows in stripes(self.size[0], row_bytes, self.device):
            yield rows, self._rows[rows]

    def full(self) -> Tensor:
        """All scores, (K, H, W)."""
        if self.are_probabilities:  # of several views, which would all be held
            return self._gathered(self.stripes())
        rows = self._rows[slice(0, self.size[0])]
        return rows.to(self._rows.dtype).permute(2, 0, 1)

    def probabilities(self) -> Tensor:
        """All scores as probabilities, (K, H, W)."""
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
        return part if self.are_probabilities else part.softmax(dim=-1)

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
