"""The masks of predicted instances, run-length encoded until they are read."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import pycocotools.mask as mask_util

# N masks (H, W) bool: an array (N, H, W), or masks that are decoded when they are read.
Masks = Sequence[np.ndarray] | np.ndarray


class RunLengthMasks(Sequence[np.ndarray]):
    """(H, W) bool masks of one size; each is decoded when it is read.

    Attributes:
        rles: in COCO's format, {"size": [H, W], "counts": bytes}.
    """

    def __init__(self, rles: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            rles: see the attribute.
        """
        self.rles = list(rles)

    @classmethod
    def encoding(cls, masks: Masks) -> "RunLengthMasks":
        """Encode masks, unless they already are."""
        return masks if isinstance(masks, cls) else cls([_encoded(mask) for mask in masks])

    def __len__(self) -> int:
        return len(self.rles)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> "RunLengthMasks": ...

    def __getitem__(self, index: int | slice) -> "np.ndarray | RunLengthMasks":
        if isinstance(index, slice):
            return RunLengthMasks(self.rles[index])
        return mask_util.decode(self.rles[index]).astype(bool)


def stacked(masks: Masks, size: tuple[int, ...]) -> np.ndarray:
    """Masks (H, W) as one array (N, H, W) bool.

    Args:
        masks: N, possibly none.
        size: (H, W).
    """
    return masks if isinstance(masks, np.ndarray) else np.array([*masks], bool).reshape(-1, *size)


def json_rles(masks: Masks) -> list[dict[str, Any]]:
    """Masks as COCO's compressed run lengths, in plain types for JSON."""
    return [
        {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
        for rle in RunLengthMasks.encoding(masks).rles
    ]


def _encoded(mask: np.ndarray) -> dict[str, Any]:
    rle: dict[str, Any] = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return rle
