"""For parts of a model that are computed in float32 under autocast, too."""

import contextlib

import torch
from torch import Tensor


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which operations on ``device`` keep the type of their inputs."""
    if not torch.amp.is_autocast_available(device.type):  # such as the meta device
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x if x.dtype.itemsize >= 4 else x.float()
