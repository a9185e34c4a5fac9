"""Predictions of mask classification without all full-resolution masks in memory.

Equal to :mod:`semask.modeling.mask_decoder.postprocess`. Class scores and segments are computed
a stripe of rows at a time, instances a mask at a time, from the masks at the decoder's resolution.
"""

import io
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from semask.modeling.layers.resize import resize
from semask.modeling.mask_decoder.postprocess import (
    PanopticRule,
    accept_segments,
    class_probabilities,
    crop_and_resize,
    mask_boxes,
    mask_quality,
    panoptic_queries,
    select_instances,
)
from semask.ops.stripes import MapRows, Rows, resized, stripes
from semask.utils.precision import autocast_off


@dataclass(frozen=True)
class MaskSizes:
    """(height, width) of an image at three stages.

    Attributes:
        padded: the model's input; masks are resized to it first.
        image: the part of the input that is not padding.
        output: the result.
    """

    padded: tuple[int, int]
    image: tuple[int, int]
    output: tuple[int, int]


class CroppedRows(Rows):
    """The upper left part of other rows."""

    def __init__(self, source: Rows, size: tuple[int, int]) -> None:
        """
        Args:
            source: the other rows.
            size: (H, W) of the part, not larger than the source.
        """
        self.size = size
        self.num_classes, self.dtype, self.device = source.num_classes, source.dtype, source.device
        self.in_stripes = source.in_stripes
        self._source = source

    def down(self, rows: slice) -> Tensor:
        """See :class:`Rows`."""
        return self._source[rows][:, : self.size[1]]


class _ClassScoreRows(Rows):
    """Class scores of the rows of mask logits."""

    in_stripes = True  # the masks' probabilities would all be held

    def __init__(self, masks: Rows, probabilities: Tensor) -> None:
        self.size, self.dtype, self.device = masks.size, masks.dtype, masks.device
        self.num_classes = probabilities.shape[1]
        self._masks = masks
        self._probabilities = probabilities

    def down(self, rows: slice) -> Tensor:
        """See :class:`Rows`."""
        with autocast_off(self.device):
            masks = self._masks[rows].sigmoid()
            return masks @ self._probabilities.to(masks.dtype)


def image_mask_rows(masks: Tensor, sizes: MaskSizes) -> Rows:
    """Mask logits (Q, h, w) as rows of the image, without its padding."""
    rows = resized(MapRows(masks), sizes.padded)
    return rows if sizes.padded == sizes.image else CroppedRows(rows, sizes.image)


def class_score_rows(
    logits: Tensor, masks: Tensor, sizes: MaskSizes, *, resize_masks: bool = False
) -> Rows:
    """Class scores at the output's size, as rows.

    Args:
        logits: (Q, K + 1).
        masks: (Q, h, w) logits.
        sizes: of the image.
        resize_masks: the masks are resized to the output's size instead of the scores.
    """
    rows = image_mask_rows(masks, sizes)
    probabilities = class_probabilities(logits)
    if resize_masks:
        return _ClassScoreRows(resized(rows, sizes.output), probabilities)
    return resized(_ClassScoreRows(rows, probabilities), sizes.output)


class EncodedMasks:
    """Masks of one size, run-length encoded; each is decoded when it is read.

    Takes the place of the tensor (N, H, W) in Detectron2's ``Instances.pred_masks``.

    Attributes:
        rles: in COCO's format, {"size": [H, W], "counts": bytes}.
    """

    def __init__(self, rles: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            rles: see the attribute.
        """
        self.rles = list(rles)

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[Tensor]:
        return (decode_mask(rle) for rle in self.rles)

    def __getitem__(self, item: Any) -> Any:
        """A mask (H, W) bool for an integer index, else :class:`EncodedMasks`."""
        chosen = np.arange(len(self.rles))[item.cpu().numpy() if torch.is_tensor(item) else item]
        if chosen.ndim == 0:
            return decode_mask(self.rles[int(chosen)])
        return EncodedMasks([self.rles[i] for i in chosen])

    def full(self, size: tuple[int, int]) -> Tensor:
        """All masks, (N, *size) bool."""
        return torch.stack(list(self)) if self.rles else torch.zeros(0, *size, dtype=torch.bool)

    def to(self, *_args: Any, **_kwargs: Any) -> "EncodedMasks":
        """Returns itself: encoded masks are on no device."""
        return self


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """(H, W) bool to COCO's run-length encoding."""
    return coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))


def decode_mask(rle: dict[str, Any]) -> Tensor:
    """COCO's run-length encoding to (H, W) bool."""
    return torch.from_numpy(coco_mask.decode(rle)).bool()


@dataclass
class EncodedInstances:
    """A :class:`semask.modeling.mask_decoder.postprocess.QueryInstances` of less memory.

    Attributes:
        queries, classes, scores, boxes: as there.
        masks: encoded, on the CPU.
    """

    queries: Tensor
    classes: Tensor
    scores: Tensor
    masks: EncodedMasks
    boxes: Tensor


def encoded_instances(
    logits: Tensor,
    masks: Tensor,
    sizes: MaskSizes,
    *,
    top: int = 100,
    things: Collection[int] | None = None,
) -> EncodedInstances:
    """The most probable instances; a query's mask is computed once for all its classes.

    Args:
        logits: (Q, K + 1).
        masks: (Q, h, w) logits.
        sizes: of the image.
        top, things: see :func:`semask.modeling.mask_decoder.postprocess.select_instances`.
    """
    queries, classes, probabilities = select_instances(logits, top=top, things=things)
    different, position = queries.unique(return_inverse=True)
    # What is kept goes into memory of its own: among the large temporary blocks of each mask it
    # would fragment the heap, which then grows by a mask of full size for each.
    quality = masks.new_zeros(len(different))
    box = torch.zeros(len(different), 4, device=masks.device)
    counts, ends = io.BytesIO(), [0]
    for place, query in enumerate(different.tolist()):
        mask = resize(masks[None, query : query + 1], sizes.padded)[0]
        mask = crop_and_resize(mask, sizes.image, sizes.output)
        inside = mask > 0
        quality[place : place + 1] = mask_quality(mask, inside)
        box[place : place + 1] = mask_boxes(inside)
        counts.write(encode_mask(inside[0])["counts"])
        ends.append(counts.tell())
    written, size = counts.getvalue(), list(sizes.output)
    rles = [{"size": size, "counts": written[start:end]} for start, end in itertools.pairwise(ends)]
    return EncodedInstances(
        queries,
        classes,
        probabilities * quality[position],
        EncodedMasks([rles[i] for i in position.tolist()]),
        box[position],
    )


def striped_panoptic(
    logits: Tensor, masks: Tensor, sizes: MaskSizes, rule: PanopticRule
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Segments that do not overlap.

    Args:
        logits: (Q, K + 1).
        masks: (Q, h, w) logits.
        sizes: of the image.
        rule: how segments are made.

    Returns:
        See :func:`semask.modeling.mask_decoder.postprocess.panoptic_prediction`.
    """
    queries, probability, labels = panoptic_queries(logits, rule)
    number = len(queries)
    if number == 0:
        return masks.new_zeros(sizes.output, dtype=torch.int32), []
    rows = resized(image_mask_rows(masks[queries], sizes), sizes.output)
    strongest = torch.empty(sizes.output, dtype=torch.int64, device=masks.device)
    is_inside = torch.empty(sizes.output, dtype=torch.bool, device=masks.device)
    areas = torch.zeros(number, 3, dtype=torch.int64, device=masks.device)
    row_bytes = sizes.output[1] * number * max(4, masks.dtype.itemsize)
    for part in stripes(sizes.output[0], row_bytes, masks.device):
        probabilities = rows[part].sigmoid()
        winner = (probabilities * probability.to(probabilities.dtype)).argmax(dim=-1)
        inside = probabilities >= 0.5
        won_inside = inside.gather(-1, winner[..., None])[..., 0]
        areas[:, 0] += winner.flatten().bincount(minlength=number)
        areas[:, 1] += inside.flatten(0, 1).sum(dim=0)
        areas[:, 2] += winner[won_inside].bincount(minlength=number)
        strongest[part], is_inside[part] = winner, won_inside
    ids, segments = accept_segments(labels.tolist(), areas.tolist(), rule)
    result = torch.tensor(ids, dtype=torch.int32, device=masks.device)[strongest]
    return (result * is_inside if rule.inside_only else result), segments
