"""How a network is applied to an image in evaluation: whole, at several scales, or in windows.

A protocol is chosen by ``TEST.PROTOCOL`` and is the same in evaluation, during training and in
the predictor. It knows nothing of the model but a function from an image to logits.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from semask.errors import ConfigError
from semask.ops.scores import Scores
from semask.ops.stripes import MapRows, Rows, resized

# An image (3, H, W), 0..255, to class logits (1, K, h, w) of a lower resolution.
Network = Callable[[Tensor], Tensor]


class TestProtocol(ABC):
    """From what the data mapper returns for an image to a score of each class at each pixel.

    The network runs at once. Its logits are kept as they are, at the low resolution, and are
    resized to the input's and the original size when the scores are asked for.
    """

    @abstractmethod
    def __call__(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int]
    ) -> Scores:
        """Scores of one image.

        Args:
            network: the model.
            inputs: "image", (3, H, W), and for ``MultiScale`` "images".
            size: height and width of the scores, those of the original image.
        """


class WholeImage(TestProtocol):
    """The image at once: logits at its size, then at the original size."""

    def __call__(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int]
    ) -> Scores:
        image = inputs["image"]
        return Scores(resized(MapRows(network(image)[0]), image.shape[-2:], size))


class MultiScale(TestProtocol):
    """The mean of the class probabilities over several sizes of the image, and their mirrors.

    ``inputs["images"]`` are the sizes, each made from the original image by the data mapper.
    """

    def __init__(self, *, flip: bool = True) -> None:
        """
        Args:
            flip: also predict the mirror image of each size.
        """
        self.flip = flip

    def __call__(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int]
    ) -> Scores:
        images = inputs.get("images")
        if not images:
            raise ConfigError(
                "TEST.PROTOCOL 'multi_scale' needs the image at each factor, as 'images' in the "
                "model's input: use semask.data.SemSegMapper with the same config."
            )
        views = []
        for image, mirrored in product(images, (False, True) if self.flip else (False,)):
            logits = network(image.flip(-1) if mirrored else image)[0]
            views.append((resized(MapRows(logits), image.shape[-2:], size), mirrored))
        return Scores(_MeanProbabilities(views), are_probabilities=True)


class _MeanProbabilities(Rows):
    """Of the logits of several views; those of mirrored ones are turned back."""

    def __init__(self, views: Sequence[tuple[Rows, bool]]) -> None:
        first = views[0][0]
        self.size, self.num_classes, self.device = first.size, first.num_classes, first.device
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self._views = views

    def down(self, rows: slice) -> Tensor:
        """See :class:`Rows`."""
        total: Tensor | None = None
        for view, mirrored in self._views:
            scores = view[rows].softmax(dim=-1)
            scores = scores.flip(1) if mirrored else scores
            total = scores if total is None else total.add_(scores)
        assert total is not None  # __init__ has seen the first
        return total.div_(len(self._views))


class SlidingWindow(TestProtocol):
    """Overlapping windows, one at a time; where they overlap, the mean of their logits.

    An image of any size fits as far as one window does. Averaged at the input's size, then
    resized.
    """

    def __init__(self, *, crop: Sequence[int], stride: Sequence[int]) -> None:
        """
        Args:
            crop: (height, width) of a window in pixels of the resized image; where the image is
                smaller, so is the window.
            stride: (vertical, horizontal) steps from window to window, not larger than the crop.

        Raises:
            ConfigError: an argument is not as described.
        """
        if len(crop) != 2 or len(stride) != 2:
            raise ConfigError(
                "TEST.SLIDE_CROP and TEST.SLIDE_STRIDE are (height, width) in pixels; "
                f"got {list(crop)} and {list(stride)}."
            )
        if not all(1 <= step <= side for step, side in zip(stride, crop, strict=True)):
            raise ConfigError(
                f"TEST.SLIDE_STRIDE {list(stride)} must be at least 1 and at most "
                f"TEST.SLIDE_CROP {list(crop)}, or pixels would be left out."
            )
        self.crop = (int(crop[0]), int(crop[1]))
        self.stride = (int(stride[0]), int(stride[1]))

    def __call__(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int]
    ) -> Scores:
        image = inputs["image"]
        height, width = image.shape[-2:]
        tops = window_starts(height, self.crop[0], self.stride[0])
        lefts = window_starts(width, self.crop[1], self.stride[1])
        windows = []
        for top, left in product(tops, lefts):
            window = image[:, top : top + self.crop[0], left : left + self.crop[1]]
            logits = MapRows(network(window)[0])
            windows.append((top, left, resized(logits, window.shape[-2:])))
        return Scores(resized(_MeanLogits(windows, (height, width)), size))


class _MeanLogits(Rows):
    """Of windows of an image, each with its first row and column, that cover it together."""

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


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side; the last one is shifted inwards to end at the border.

    Args:
        length: of the side, in pixels.
        crop, stride: of the windows, in pixels.
    """
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def build_test_protocol(cfg: CfgNode) -> TestProtocol:
    """The protocol that ``cfg.TEST`` describes.

    Raises:
        ConfigError: there is none of that name, or one of its keys cannot be used.
    """
    test = cfg.TEST
    if test.PROTOCOL == "whole":
        return WholeImage()
    if test.PROTOCOL == "multi_scale":
        return MultiScale(flip=test.MULTI_SCALE_FLIP)
    if test.PROTOCOL == "slide":
        return SlidingWindow(crop=test.SLIDE_CROP, stride=test.SLIDE_STRIDE)
    raise ConfigError(f"TEST.PROTOCOL is '{test.PROTOCOL}'; use 'whole', 'multi_scale' or 'slide'.")
