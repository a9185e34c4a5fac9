"""How a network is applied to an image in evaluation: whole, at several scales, or in windows.

A protocol is chosen by ``TEST.PROTOCOL`` and is the same in evaluation, during training and in
the predictor. All it needs of the model is a function from an image to class scores.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.modeling.heads.base import ScoreKind
from semask.modeling.layers.resize import resize

# An image (3, H, W), 0..255, to class scores (K, H, W).
Network = Callable[[Tensor], Tensor]


class InferenceProtocol(nn.Module, ABC):
    """Scores of each class at each pixel, from the data mapper's output for an image.

    It has no parameters. It is a module, so that it is one of the model's parts, which can be
    replaced by their type.
    """

    def score_kind(self, kind: ScoreKind) -> ScoreKind:
        """The kind of the scores it returns, for a network that returns ``kind``."""
        return kind

    @abstractmethod
    def forward(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int], kind: ScoreKind
    ) -> Tensor:
        """Scores of one image.

        Args:
            network: the model.
            inputs: "image", (3, H, W), and for ``MultiScale`` "images".
            size: height and width of the scores, those of the original image.
            kind: what the network returns.

        Returns:
            (K, *size), of :meth:`score_kind`.
        """


class WholeImage(InferenceProtocol):
    """The whole image: scores at its size, resized to the original size."""

    def forward(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int], kind: ScoreKind
    ) -> Tensor:
        """See :class:`InferenceProtocol`."""
        return resize(network(inputs["image"])[None], size)[0]


class MultiScale(InferenceProtocol):
    """The mean of the class probabilities over several sizes of the image, and their mirrors.

    ``inputs["images"]`` are the sizes, each made from the original image by the data mapper.
    Scores other than logits are averaged directly.
    """

    def __init__(self, *, flip: bool = True) -> None:
        """
        Args:
            flip: also predict the mirror image of each size.
        """
        super().__init__()
        self.flip = flip

    def score_kind(self, kind: ScoreKind) -> ScoreKind:
        """See :class:`InferenceProtocol`."""
        return "probabilities" if kind == "logits" else kind

    def forward(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int], kind: ScoreKind
    ) -> Tensor:
        """See :class:`InferenceProtocol`."""
        total: Tensor | None = None
        views = self.views(inputs)
        for image, mirrored in views:
            scores = resize(network(image.flip(-1) if mirrored else image)[None], size)[0]
            scores = scores.softmax(dim=0) if kind == "logits" else scores
            scores = scores.flip(-1) if mirrored else scores
            total = scores if total is None else total + scores
        assert total is not None  # there is a view
        return total / len(views)

    def views(self, inputs: Mapping[str, Any]) -> list[tuple[Tensor, bool]]:
        """The image at each of its sizes, and whether it is to be mirrored.

        Raises:
            ConfigError: there are none.
        """
        images = inputs.get("images")
        if not images:
            raise ConfigError(
                "TEST.PROTOCOL 'multi_scale' needs the image at each factor, as 'images' in the "
                "model's input: use the data mapper of the config, build_task(cfg).build_mapper("
                "is_train=False) of semask.tasks."
            )
        return list(product(images, (False, True) if self.flip else (False,)))


class SlidingWindow(InferenceProtocol):
    """Overlapping windows, one at a time; scores are averaged where windows overlap.

    The network sees one window at a time, so the image may have any size. Scores are averaged at
    the input's size, then resized.
    """

    def __init__(self, *, crop: Sequence[int], stride: Sequence[int]) -> None:
        """
        Args:
            crop: (height, width) of a window in pixels of the resized image; where the image is
                smaller, so is the window.
            stride: (vertical, horizontal) steps from window to window, not larger than the crop.

        Raises:
            ConfigError: an argument is out of its range.
        """
        super().__init__()
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

    def forward(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int], kind: ScoreKind
    ) -> Tensor:
        """See :class:`InferenceProtocol`."""
        height, width = inputs["image"].shape[-2:]
        total = count = None
        for top, left, window in self.windows(inputs["image"]):
            scores = network(window)
            if total is None or count is None:
                dtype = torch.promote_types(scores.dtype, torch.float32)
                total = scores.new_zeros(len(scores), height, width, dtype=dtype)
                count = scores.new_zeros(1, height, width, dtype=dtype)
            rows, columns = (slice(top, top + scores.shape[1]), slice(left, left + scores.shape[2]))
            total[:, rows, columns] += scores
            count[:, rows, columns] += 1
        assert total is not None  # there is a window
        assert count is not None
        return resize((total / count)[None], size)[0]

    def windows(self, image: Tensor) -> list[tuple[int, int, Tensor]]:
        """First row, first column, and pixels of each window of an image (3, H, W)."""
        tops = window_starts(image.shape[-2], self.crop[0], self.stride[0])
        lefts = window_starts(image.shape[-1], self.crop[1], self.stride[1])
        height, width = self.crop
        return [
            (top, left, image[:, top : top + height, left : left + width])
            for top, left in product(tops, lefts)
        ]


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """First pixels of the windows along one side; the last window ends at the border.

    Args:
        length: of the side, in pixels.
        crop, stride: of the windows, in pixels.
    """
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def build_test_protocol(cfg: CfgNode) -> InferenceProtocol:
    """The protocol that ``cfg.TEST`` describes.

    Raises:
        ConfigError: ``TEST.PROTOCOL`` is unknown, or a key of it is out of its range.
    """
    test = cfg.TEST
    if test.PROTOCOL == "whole":
        return WholeImage()
    if test.PROTOCOL == "multi_scale":
        return MultiScale(flip=test.MULTI_SCALE_FLIP)
    if test.PROTOCOL == "slide":
        return SlidingWindow(crop=test.SLIDE_CROP, stride=test.SLIDE_STRIDE)
    raise ConfigError(f"TEST.PROTOCOL is '{test.PROTOCOL}'; use 'whole', 'multi_scale' or 'slide'.")
