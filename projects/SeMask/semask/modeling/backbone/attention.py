"""Window attention with a relative position bias (arXiv 2103.14030, section 3.2)."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semask.ops.window import (
    WindowLayout,
    append_zero,
    gather_windows,
    scatter_windows,
    window_layout,
)

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
        sdpa: compute by ``F.scaled_dot_product_attention``; the same, in fewer kernels.
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
        sdpa: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.attention_dropout = attention_dropout
        self.sdpa = sdpa
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
        layout = self.layout(x)
        bias = self.masked(self.bias(), layout)
        out = self.attend(gather_windows(self.project(x.flatten(0, 2)), layout), bias)
        return self.dropout(self.proj(scatter_windows(out, layout))).view(x.shape)

    def layout(self, x: Tensor) -> WindowLayout:
        """The windows of maps (B, H, W, C)."""
        batch, height, width, _ = x.shape
        return window_layout(batch, height, width, self.window_size, self.shift, x.device)

    def project(self, tokens: Tensor) -> Tensor:
        """q, k and v of each token, and of the one that stands for the padding.

        Projecting first and cutting windows then is the same and does not project padding.

        Args:
            tokens: (n, C), of maps in rows or any of them.

        Returns:
            (n + 1, 3 C).
        """
        return self.qkv(append_zero(tokens))

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """Attention in windows that are independent of each other.

        Args:
            qkv: (windows, N, 3 C).
            bias: (heads, windows or 1, N, N), added to the logits.

        Returns:
            (windows, N, C).
        """
        windows, tokens, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        heads, head_dim = self.num_heads, dim // self.num_heads
        # Heads first, so that one bias serves all windows.
        qkv = qkv.view(windows, tokens, 3, heads, head_dim).permute(2, 3, 0, 1, 4).contiguous()
        bias = bias.to(qkv.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        if self.sdpa:
            query, key, value = qkv.unbind(0)
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=bias, dropout_p=dropout
            )
        else:
            query, key, value = qkv.flatten(1, 2).unbind(0)
            bias = bias.expand(-1, windows, -1, -1).flatten(0, 1)
            logits = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=head_dim**-0.5)
            weights = F.dropout(logits.softmax(dim=-1), dropout).to(value.dtype)
            out = torch.bmm(weights, value).view(heads, windows, tokens, head_dim)
        return out.permute(1, 2, 0, 3).flatten(2)

    def bias(self) -> Tensor:
        """The relative position bias of each pair of tokens: (heads, 1, N, N)."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()]
        return bias.view(*index.shape, self.num_heads).permute(2, 0, 1)[:, None]

    def masked(self, bias: Tensor, layout: WindowLayout, part: slice = slice(None)) -> Tensor:
        """With a shift, also keep apart what only the shift joined.

        Args:
            bias: see :meth:`bias`.
            layout: of all windows.
            part: of the windows.

        Returns:
            (heads, windows, N, N); without a shift ``bias``, which serves any number of them.
        """
        if not self.shift:
            return bias
        kinds = self.relative_position_index.new_zeros(layout.rows, layout.cols)
        kinds[:, -1] += 1
        kinds[-1, :] += 2
        return (
            bias + self.shift_masks[kinds.flatten().repeat(layout.windows // kinds.numel())[part]]
        )
