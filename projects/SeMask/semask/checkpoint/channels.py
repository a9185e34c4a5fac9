"""Adapts weights that were trained on RGB to images of any number of channels."""

import logging
import math
from collections.abc import Mapping

from torch import Tensor

logger = logging.getLogger(__name__)

RGB = 3


def adapt_channels(
    state_dict: Mapping[str, Tensor], model_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Fit the first convolution of a pre-trained backbone to images of N channels.

    Timm's rule: for one channel, the sum over the three; else the three in turn until there are N,
    times 3 / N. So for equal channels the features have the same scale as before.

    Args:
        state_dict: parameters by this project's names.
        model_state: the model's, for the shapes wanted.

    Returns:
        ``state_dict`` with such a weight replaced.
    """
    adapted = dict(state_dict)
    for name, value in state_dict.items():
        wanted = model_state.get(name)
        if wanted is None or not name.startswith("backbone.") or value.ndim != 4:
            continue
        rest = (wanted.shape[0], *wanted.shape[2:]) == (value.shape[0], *value.shape[2:])
        if not rest or value.shape[1] != RGB or wanted.shape[1] == RGB:
            continue
        adapted[name] = adapt_weight(value, wanted.shape[1])
        logger.info(
            "'%s' was trained on RGB: its weights are %s for images of %d channels",
            *(name, "summed" if wanted.shape[1] == 1 else "repeated and scaled", wanted.shape[1]),
        )
    return adapted


def adapt_weight(weight: Tensor, channels: int) -> Tensor:
    """The weight of a convolution of RGB for another number of channels.

    Args:
        weight: (O, 3, h, w).
        channels: N, at least 1.

    Returns:
        (O, N, h, w), of the same type.
    """
    values = weight.float()
    if channels == 1:
        return values.sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = values.repeat(1, math.ceil(channels / RGB), 1, 1)[:, :channels]
    return (repeated * (RGB / channels)).to(weight.dtype)
