"""The parts of a Swin transformer (arXiv 2103.14030). Token maps are (B, H, W, C)."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .window import merge_windows, pad_to_multiple, split_windows

# Added to the attention logits of token pairs that are not neighbours in the image.
MASKED_LOGIT = -100.0


class PatchEmbed(nn.Module):
    """Image to tokens: zero-pad to a multiple of the patch, convolve, normalise."""

    def __init__(self, *, embed_dim: int, in_channels: int = 3, patch_size: int = 4) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, ceil(H / patch), ceil(W / patch), C)."""
        height, width = image.shape[-2:]
        bottom, right = -height % self.patch_size, -width % self.patch_size
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Half the height and width, twice the channels; odd sides are zero-padded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2C)."""
        x = pad_to_multiple(x, 2)
        neighbours = [x[:, row::2, col::2] for col in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a residual branch of whole samples."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Mlp(nn.Module):
    """Linear, GELU (exact), linear, along the last dimension."""

    def __init__(self, *, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


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

    With a shift, the windows are those of a map that was rolled by it.
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

    def forward(self, windows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend within each window.

        Args:
            windows: (B * rows * cols, N, C), the windows of an image next to each other.
            grid: rows and columns of the windows of one image.

        Returns:
            (B * rows * cols, N, C).
        """
        count, tokens, dim = windows.shape
        qkv = self.qkv(windows).view(count, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._bias(grid)
        if self.shift:
            bias = bias.repeat(count // len(bias), 1, 1, 1)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias.to(query.dtype),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.dropout(self.proj(out.transpose(1, 2).reshape(count, tokens, dim)))

    def _bias(self, grid: tuple[int, int]) -> Tensor:
        """What is added to the logits: (1, heads, N, N), with a shift (rows * cols, ...)."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()]
        bias = bias.view(*index.shape, self.num_heads).permute(2, 0, 1)[None]
        if not self.shift:
            return bias
        kinds = index.new_zeros(grid)
        kinds[:, -1] += 1
        kinds[-1, :] += 2
        return (bias + self.shift_masks[:, None])[kinds.flatten()]


class SwinBlock(nn.Module):
    """Window attention and MLP, each with a normalised input and a residual connection."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim=dim,
            num_heads=num_heads,
            window_size=window_size,
            shift=shift,
            attention_dropout=attention_dropout,
            dropout=dropout,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio), dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self._window_attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _window_attention(self, x: Tensor) -> Tensor:
        size = self.window_size
        height, width = x.shape[1:3]
        x = pad_to_multiple(x, size)
        padded_height, padded_width = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = self.attn(split_windows(x, size), (padded_height // size, padded_width // size))
        x = merge_windows(windows, size, padded_height, padded_width)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width]
