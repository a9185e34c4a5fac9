"""Windows of a token map: padding, splitting and merging (arXiv 2103.14030, section 3.2)."""

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Zero-pad the height and width of ``x`` (B, H, W, C), right and bottom, to a multiple."""
    _, height, width, _ = x.shape
    bottom, right = -height % size, -width % size
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def split_windows(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) to (B * windows, size * size, C); H and W are multiples of ``size``."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, channels)


def merge_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Inverse of :func:`split_windows`: back to (B, height, width, C)."""
    channels = windows.shape[-1]
    x = windows.view(-1, height // size, width // size, size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)
