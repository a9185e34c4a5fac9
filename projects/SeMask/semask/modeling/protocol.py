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

from semask.config import ConfigError

from .resize import resize

# An image (3, H, W), 0..255, to class logits (1, K, h, w) of a lower resolution.
Network = Callable[[Tensor], Tensor]


class TestProtocol(ABC):
    """From what the data mapper returns for an image to a score of each class at each pixel."""

    #: whether the scores are probabilities; otherwise they are logits
    gives_probabilities = False

    @abstractmethod
    def __call__(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int]
    ) -> Tensor:
        """Scores of one image.

        Args:
            network: the model.
            inputs: "image", (3, H, W), and for ``MultiScale`` "images".
            size: height and width of the result, those of the original image.

        Returns:
            (K, *size).
        """


class WholeImage(TestProtocol):
    """The image at once: logits at its size, then at the original size."""

    def __call__(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int]
    ) -> Tensor:
        image = inputs["image"]
        return resize(resize(network(image), image.shape[-2:]), size)[0]


class MultiScale(TestProtocol):
    """The mean of the class probabilities over several sizes of the image, and their mirrors.

    ``inputs["images"]`` are the sizes, each made from the original image by the data mapper.
    Only one running sum is kept, whatever the number of sizes.
    """

    gives_probabilities = True

    def __init__(self, *, flip: bool = True) -> None:
        """
        Args:
            flip: also predict the mirror image of each size.
        """
        self.flip = flip

    def __call__(
        self, network: Network, inputs: Mapping[str, Any], size: tuple[int, int]
    ) -> Tensor:
        images = inputs.get("images")
        if not images:
            raise ConfigError(
                "TEST.PROTOCOL 'multi_scale' needs the image at each factor, as 'images' in the "
                "model's input: use semask.data.SemSegMapper with the same config."
            )
        views = list(product(images, (False, True) if self.flip else (False,)))
        total = _probabilities(network, *views[0], size)
        for image, mirrored in views[1:]:
            total += _probabilities(network, image, mirrored, size)
        return total.div_(len(views))


def _probabilities(
    network: Network, image: Tensor, mirrored: bool, size: tuple[int, int]
) -> Tensor:
    logits = network(image.flip(-1) if mirrored else image)
    scores = resize(resize(logits, image.shape[-2:]), size)[0].softmax(dim=0)
    return scores.flip(-1) if mirrored else scores


class SlidingWindow(TestProtocol):
    """Overlapping windows, one at a time; where they overlap, the mean of their logits.

    The sum of the logits is the only tensor of the image's size that is kept, so an image of any
    size fits as far as one window does. Averaged at the input's size, then resized.
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
    ) -> Tensor:
        image = inputs["image"]
        height, width = image.shape[-2:]
        tops = window_starts(height, self.crop[0], self.stride[0])
        lefts = window_starts(width, self.crop[1], self.stride[1])
        total: Tensor | None = None
        for top, left in product(tops, lefts):
            rows, columns = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
            window = image[:, rows, columns]
            logits = resize(network(window), window.shape[-2:])[0]
            if total is None:  # now the number of classes and the device are known
                dtype = torch.promote_types(logits.dtype, torch.float32)
                total = logits.new_zeros((len(logits), height, width), dtype=dtype)
            total[:, rows, columns] += logits
        assert total is not None  # there is at least one window
        windows = torch.outer(
            _coverage(tops, self.crop[0], height), _coverage(lefts, self.crop[1], width)
        )
        total /= windows.to(total)
        return resize(total[None], size)[0]


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side; the last one is shifted inwards to end at the border.

    Args:
        length: of the side, in pixels.
        crop, stride: of the windows, in pixels.
    """
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def _coverage(starts: Sequence[int], crop: int, length: int) -> Tensor:
    """By how many windows each position of one side is covered."""
    counts = torch.zeros(length)
    for start in starts:
        counts[start : start + crop] += 1
    return counts


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
