"""Evaluation that computes scores a stripe of rows at a time, when they are read.

The network runs on the whole image. Its prediction is kept at the low resolution, and is resized
to the input's and the original size on demand. ``predict`` of the forms here
returns :class:`LazyScores` where the plain ones return tensors; ``inference`` returns tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor

from semask.modeling.heads.base import ScoreKind
from semask.modeling.mask_decoder.postprocess import as_instances
from semask.modeling.meta_arch.mask_classification import SeMaskMaskFormer
from semask.modeling.meta_arch.protocol import MultiScale, SlidingWindow, WholeImage
from semask.modeling.meta_arch.semantic import SeMaskSegmentor
from semask.ops.lazy_scores import LazyScores
from semask.ops.mask_postprocess import (
    CroppedRows,
    EncodedMasks,
    MaskSizes,
    class_score_rows,
    encoded_instances,
    striped_panoptic,
)
from semask.ops.stripes import MapRows, Rows, resized

# An image (3, H, W), 0..255, to the rows of its scores (H, W, K).
RowNetwork = Callable[[Tensor], Rows]


class StreamedSegmentor(SeMaskSegmentor):
    """Returns rows instead of tensors to its protocol, which is one of the forms below."""

    def inference(
        self, batched_inputs: list[dict[str, Any]], return_priors: bool = False
    ) -> list[dict[str, Any]]:
        """See :class:`SeMaskSegmentor`."""
        return [
            {k: v.full() if isinstance(v, LazyScores) else v for k, v in output.items()}
            for output in super().inference(batched_inputs, return_priors)
        ]

    def class_scores(  # type: ignore[override]
        self, features: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Rows:
        """See :class:`SeMaskSegmentor`; rows of the scores."""
        return score_rows(self.head_prediction(features), size, self.padded_size(size))

    def resized(self, maps: Tensor, *sizes: tuple[int, int]) -> LazyScores:  # type: ignore[override]
        """See :class:`SeMaskSegmentor`; lazy logits."""
        rows = _without_padding(MapRows(maps[0]), self.padded_size(sizes[0]), sizes[0])
        return LazyScores(resized(rows, *sizes[1:]), "logits")


class StreamedMaskFormer(SeMaskMaskFormer):
    """Computes full-resolution masks one at a time, and only those of the result.

    ``predict`` has the masks of "instances" run-length encoded, as :class:`EncodedMasks`.
    """

    def inference(
        self, batched_inputs: list[dict[str, Any]], return_priors: bool = False
    ) -> list[dict[str, Any]]:
        """See :class:`SeMaskMaskFormer`."""
        return [
            {key: _in_full(value) for key, value in output.items()}
            for output in super().inference(batched_inputs, return_priors)
        ]

    def class_scores(  # type: ignore[override]
        self, features: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Rows:
        """See :class:`SeMaskMaskFormer`; rows of the scores."""
        prediction = self.head_prediction(features)
        logits, masks = prediction["pred_logits"][0], prediction["pred_masks"][0]
        return class_score_rows(logits, masks, self._sizes(size, size))

    def postprocess(
        self, logits: Tensor, masks: Tensor, image_size: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, Any]:
        """See :class:`SeMaskMaskFormer`."""
        sizes = self._sizes(image_size, size)
        output: dict[str, Any] = {}
        if self.semantic_on:
            rows = class_score_rows(logits, masks, sizes, resize_masks=True)
            output["sem_seg"] = LazyScores(rows, self.score_kind)
        if self.instance_on:
            found = encoded_instances(
                logits, masks, sizes, top=self.detections_per_image, things=self.instance_classes
            )
            output["instances"] = as_instances(
                size, found.classes, found.scores, found.masks, found.boxes
            )
        if self.panoptic_on:
            assert self.panoptic_rule is not None  # as checked
            output["panoptic_seg"] = striped_panoptic(logits, masks, sizes, self.panoptic_rule)
        return output

    def _sizes(self, image_size: tuple[int, int], size: tuple[int, int]) -> MaskSizes:
        return MaskSizes(padded=self.padded_size(image_size), image=image_size, output=size)


def _in_full(value: Any) -> Any:
    if isinstance(value, LazyScores):
        return value.full()
    if isinstance(value, Instances) and isinstance(value.pred_masks, EncodedMasks):
        value.pred_masks = value.pred_masks.full(value.image_size).to(value.scores.device)
    return value


def score_rows(
    prediction: Mapping[str, Tensor], size: tuple[int, int], padded: tuple[int, int] | None = None
) -> Rows:
    """The rows of ``semantic_scores`` for a head's prediction of one image.

    Args:
        prediction: of the head.
        size: of the image.
        padded: size of the backbone's input, with the image in its upper left; None = ``size``.
    """
    padded = padded or size
    if "logits" in prediction:
        return _without_padding(MapRows(prediction["logits"][0]), padded, size)
    logits, masks = prediction["pred_logits"][0], prediction["pred_masks"][0]
    return class_score_rows(logits, masks, MaskSizes(padded=padded, image=size, output=size))


def _without_padding(rows: Rows, padded: tuple[int, int], size: tuple[int, int]) -> Rows:
    """Resized to the padded size, then cropped to that of the image."""
    rows = resized(rows, padded)
    return rows if padded == size else CroppedRows(rows, size)


class StreamedWholeImage(WholeImage):
    """The plain form's scores on demand."""

    def forward(  # type: ignore[override]
        self, network: RowNetwork, inputs: Mapping[str, Any], size: tuple[int, int], kind: ScoreKind
    ) -> LazyScores:
        """See :class:`WholeImage`."""
        return LazyScores(resized(network(inputs["image"]), size), kind)


class StreamedMultiScale(MultiScale):
    """The plain form's scores on demand."""

    def forward(  # type: ignore[override]
        self, network: RowNetwork, inputs: Mapping[str, Any], size: tuple[int, int], kind: ScoreKind
    ) -> LazyScores:
        """See :class:`MultiScale`."""
        views = [
            (resized(network(image.flip(-1) if mirrored else image), size), mirrored)
            for image, mirrored in self.views(inputs)
        ]
        return LazyScores(_MeanOfViews(views, softmax=kind == "logits"), self.score_kind(kind))


class _MeanOfViews(Rows):
    """The mean over several views; mirrored ones are flipped back."""

    in_stripes = True  # every view would be held

    def __init__(self, views: Sequence[tuple[Rows, bool]], *, softmax: bool) -> None:
        first = views[0][0]
        self.size, self.num_classes, self.device = first.size, first.num_classes, first.device
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self._views, self._softmax = views, softmax

    def down(self, rows: slice) -> Tensor:
        """See :class:`Rows`."""
        total: Tensor | None = None
        for view, mirrored in self._views:
            scores = view[rows].softmax(dim=-1) if self._softmax else view[rows]
            scores = scores.flip(1) if mirrored else scores
            total = scores.clone() if total is None else total.add_(scores)
        assert total is not None  # __init__ has seen the first
        return total.div_(len(self._views))


class StreamedSlidingWindow(SlidingWindow):
    """The plain form's scores on demand."""

    def forward(  # type: ignore[override]
        self, network: RowNetwork, inputs: Mapping[str, Any], size: tuple[int, int], kind: ScoreKind
    ) -> LazyScores:
        """See :class:`SlidingWindow`."""
        image = inputs["image"]
        windows = [(top, left, network(window)) for top, left, window in self.windows(image)]
        mean = _MeanOfWindows(windows, (image.shape[-2], image.shape[-1]))
        return LazyScores(resized(mean, size), kind)


class _MeanOfWindows(Rows):
    """The mean over overlapping windows, each with its first row and column."""

    def __init__(self, windows: Sequence[tuple[int, int, Rows]], size: tuple[int, int]) -> None:
        first = windows[0][2]
        self.size, self.num_classes, self.device = size, first.num_classes, first.device
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self._windows = windows

    def down(self, rows: slice) -> Tensor:
        """See :class:`Rows`."""
        shape = (rows.stop - rows.start, self.size[1])
        total = torch.zeros(*shape, self.num_classes, dtype=self.dtype, device=self.device)
        count = torch.zeros(*shape, 1, dtype=self.dtype, device=self.device)
        for top, left, window in self._windows:
            height, width = window.size
            start, stop = max(rows.start, top), min(rows.stop, top + height)
            if start < stop:
                here = slice(start - rows.start, stop - rows.start), slice(left, left + width)
                total[here] += window[start - top : stop - top]
                count[here] += 1
        return total.div_(count)
