"""Windows of a token map, and attention within them (arXiv 2103.14030, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semask.modeling.layers.resize import up_to_multiple
from semask.utils.symbolic import is_symbolic


def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Zero-pad a map (B, H, W, C) right and bottom, so that ``size`` divides H and W."""
    height, width = x.shape[1:3]
    rows, columns = (up_to_multiple(side, size) for side in (height, width))
    return F.pad(x, (0, 0, 0, columns - width, 0, rows - height))


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`pad_to_multiple`: the first rows and columns of a map (B, H, W, C)."""
    rows, columns = x.shape[1:3]
    if not is_symbolic(rows, columns):
        return x[:, :height, :width]
    # Has strides of its own, where those of a slice depend on whether anything is cut off.
    return F.pad(x, (0, 0, 0, width - columns, 0, height - rows))


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


# Added to the attention logits of token pairs that are not neighbours in the image.
MASKED_LOGIT = -100.0


def relative_position_index(size: int) -> Tensor:
    """Row of the bias table for each pair of tokens in a window: (size**2, size**2) int64."""
    rows, cols = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    rows, cols = rows.flatten(), cols.flatten()
    row_offset = rows[:, None] - rows[None, :] + size - 1
    col_offset = cols[:, None] - cols[None, :] + size - 1
    return row_offset * (2 * size - 1) + col_offset


class WindowAttention(nn.Module):
    """Multi-head attention within (shifted) windows, with a learned relative position bias.

    softmax(q k^T / sqrt(d) + bias + mask) v for each window and head, d channels per head.

    Args:
        dim: channels C.
        num_heads: heads, a divisor of C.
        window_size: side of a window, in tokens.
        shift: of the map before it is cut into windows, in tokens; 0 = none.
        attention_dropout: rate on the attention weights.
        dropout: rate on the output.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int = 0,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads)
        )
        index = relative_position_index(window_size)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window of the map, zero-padded to whole windows.

        Args:
            x: (B, H, W, C).

        Returns:
            (B, H, W, C).
        """
        height, width = x.shape[1:3]
        x = pad_to_multiple(x, self.window_size)
        padded_height, padded_width = x.shape[1:3]
        x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.window_size)
        bias = self.bias()
        if self.shift:
            mask = self.mask(padded_height, padded_width).to(bias)
            bias = bias + mask.repeat(x.shape[0], 1, 1)
        windows = self.proj(self.attend(self.qkv(windows), bias))
        x = window_reverse(windows, self.window_size, padded_height, padded_width)
        x = torch.roll(x, (self.shift, self.shift), dims=(1, 2))
        return self.dropout(crop(x, height, width))

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """Attention in windows that are independent of each other.

        Args:
            qkv: queries, keys and values, (windows, N, 3 C).
            bias: (heads, windows or 1, N, N), added to the logits.

        Returns:
            (windows, N, C).
        """
        windows, tokens, _ = qkv.shape
        qkv = qkv.reshape(windows, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 3, 0, 1, 4)  # (heads, windows, N, d) each
        logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias
        weights = F.dropout(logits.softmax(dim=-1), self.attention_dropout, self.training)
        return (weights @ value).permute(1, 2, 0, 3).flatten(2)

    def bias(self) -> Tensor:
        """The relative position bias of each pair of tokens: (heads, 1, N, N)."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()]
        return bias.view(*index.shape, self.num_heads).permute(2, 0, 1)[:, None]

    def mask(self, height: int, width: int) -> Tensor:
        """Separates the tokens that are neighbours only because of the roll.

        Args:
            height, width: of the padded map.

        Returns:
            (windows, N, N): 0 where two tokens may see each other, else -100.
        """
        device = self.relative_position_index.device
        row_wrapped = torch.arange(height, device=device) >= height - self.shift
        col_wrapped = torch.arange(width, device=device) >= width - self.shift
        region = 2 * row_wrapped[:, None].long() + col_wrapped.long()
        region = window_partition(region[None, :, :, None], self.window_size)
        apart = region != region.transpose(1, 2)
        return torch.zeros(apart.shape, device=device).masked_fill(apart, MASKED_LOGIT)
