"""Window attention with a relative position bias (arXiv 2103.14030, section 3.2)."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .window import from_windows, to_windows

# Added to the attention logits of token pairs that are not neighbours in the image.
MASKED_LOGIT = -100.0


def relative_position_index(size: int) -> Tensor:
    """Row of the bias table for each pair of tokens in a window: (size**2, size**2) int64."""
    rows, cols = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    rows, cols = rows.flatten(), cols.flatten()
    row_offset = rows[:, None] - rows[None, :] + size - 1
    col_offset = cols[:, None] - cols[None, :] + size - 1
    return row_offset * (2 * size - 1) + col_offset


def shifted_window_masks(size: int, shift: int) -> Tensor:
    """What keeps apart the tokens that only the cyclic shift made neighbours.

    That happens in the last row and the last column of windows alone, so four masks serve a map
    of any size: of a window in neither, in the last column, in the last row, and in both.

    Args:
        size, shift: of the window, in tokens.

    Returns:
        (4, size**2, size**2): 0 where two tokens may see each other, else -100.
    """
    wrapped = torch.arange(size) >= size - shift
    inside = torch.zeros(size, dtype=torch.bool)
    masks = []
    for rows, cols in product((inside, wrapped), repeat=2):
        region = (2 * rows[:, None] + cols[None, :].long()).flatten()
        apart = region[:, None] != region[None, :]
        masks.append(torch.zeros(apart.shape).masked_fill_(apart, MASKED_LOGIT))
    return torch.stack(masks)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned relative position bias.

    softmax(q k^T / sqrt(d) + bias + mask) v for each window and head, d channels per head.

    Args:
        dim: channels C.
        num_heads: heads, a divisor of C.
        window_size: side of a window, in tokens.
        shift: by how much the map is rolled before it is cut into windows; 0 = not at all.
        attention_dropout, dropout: rates on the attention weights and on the output.
    """

    relative_position_index: Tensor
    shift_masks: Tensor

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
        if shift:
            masks = shifted_window_masks(window_size, shift)
            self.register_buffer("shift_masks", masks, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window of the map, zero-padded to whole windows.

        Args:
            x: (B, H, W, C).

        Returns:
            (B, H, W, C).
        """
        batch, height, width, dim = x.shape
        tokens, head_dim = self.window_size**2, dim // self.num_heads
        # Before the windows are cut: a token of the padding is 0, so its q, k, v are the biases.
        qkv = to_windows(self.qkv(x), self.window_size, self.shift, fill=self.qkv.bias)
        qkv = qkv.view(-1, tokens, 3, self.num_heads, head_dim)
        # Heads first, so that one bias serves all windows.
        query, key, value = qkv.permute(2, 3, 0, 1, 4).flatten(1, 2).contiguous().unbind(0)
        bias = self._bias(batch, height, width).to(query.dtype)
        logits = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=head_dim**-0.5)
        weights = F.dropout(logits.softmax(dim=-1), self.attention_dropout, self.training)
        out = torch.bmm(weights.to(value.dtype), value)
        out = out.view(self.num_heads, -1, tokens, head_dim).permute(1, 2, 0, 3).flatten(2)
        out = from_windows(out, (batch, height, width), self.window_size, self.shift)
        return self.dropout(self.proj(out))

    def _bias(self, batch: int, height: int, width: int) -> Tensor:
        """What is added to the logits: (heads * B * windows, N, N)."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()]
        bias = bias.view(*index.shape, self.num_heads).permute(2, 0, 1)[:, None]
        rows, cols = -(-height // self.window_size), -(-width // self.window_size)
        if self.shift:
            kinds = index.new_zeros(rows, cols)
            kinds[:, -1] += 1
            kinds[-1, :] += 2
            bias = bias + self.shift_masks[kinds.flatten().repeat(batch)]
        return bias.expand(-1, batch * rows * cols, -1, -1).flatten(0, 1)
