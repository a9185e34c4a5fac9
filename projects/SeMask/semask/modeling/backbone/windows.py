"""Windows of a token map (arXiv 2103.14030, section 3.2)."""

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Zero-pad a map (B, H, W, C) right and bottom, so that ``size`` divides H and W."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -width % size, 0, -height % size))


def window_partition(x: Tensor, size: int) -> Tensor:
    """Cut maps into windows.

    Args:
        x: (B, H, W, C); ``size`` divides H and W.
        size: side of a window, in tokens.

    Returns:
        (B * windows, size**2, C), the windows of a map in rows, the maps one after the other.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size**2, channels)


def window_reverse(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Inverse of :func:`window_partition`: (B * windows, size**2, C) to (B, H, W, C)."""
    channels = windows.shape[-1]
    x = windows.reshape(-1, height // size, width // size, size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)
