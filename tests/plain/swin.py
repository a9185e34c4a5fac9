"""Swin (arXiv 2103.14030): tokens are (B, H * W, C), attention is written out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C), with zeros on the right and at the bottom up to multiples of ``size``."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -width % size, 0, -height % size))


def window_partition(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) to (B * windows, size * size, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, channels)


def window_reverse(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of ``window_partition``."""
    channels = windows.shape[-1]
    x = windows.view(-1, height // size, width // size, size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, channels)


def shifted_window_mask(height: int, width: int, size: int, shift: int, like: Tensor) -> Tensor:
    """(windows, size^2, size^2): -100 between tokens that the roll alone made neighbours."""
    height, width = height + -height % size, width + -width % size
    regions = like.new_zeros((1, height, width, 1))
    bands = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    number = 0
    for rows in bands:
        for columns in bands:
            regions[:, rows, columns, :] = number
            number += 1
    windows = window_partition(regions, size).squeeze(-1)
    different = windows.unsqueeze(1) != windows.unsqueeze(2)
    return like.new_zeros(different.shape).masked_fill(different, -100.0)


def relative_position_index(size: int) -> Tensor:
    """(size^2, size^2): the row of the bias table for each pair of tokens of a window."""
    steps = torch.arange(size)
    places = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1)
    offsets = places[:, :, None] - places[:, None, :] + size - 1
    return offsets[0] * (2 * size - 1) + offsets[1]


class DropPath(nn.Module):
    """Leaves a residual branch out, for each image by chance, in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = torch.rand((len(x),) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device) < keep
        return x / keep * mask


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned relative position bias."""

    def __init__(self, dim: int, heads: int, size: int, attn_drop: float, drop: float) -> None:
        super().__init__()
        self.heads, self.size, self.scale = heads, size, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index", relative_position_index(size), persistent=False)
        self.index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        count, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.index.view(-1)]
        bias = bias.view(tokens, tokens, self.heads).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        if mask is not None:
            windows = len(mask)
            attn = attn.view(count // windows, windows, self.heads, tokens, tokens)
            attn = attn + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(count, self.heads, tokens, tokens)
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(count, tokens, channels)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwinBlock(nn.Module):
    """Attention in (shifted) windows, then an MLP, each with its residual."""

    def __init__(
        self,
        dim: int,
        heads: int,
        size: int,
        shift: int,
        *,
        mlp_ratio: float,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.size, self.shift = size, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, size, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, height: int, width: int, mask: Tensor | None) -> Tensor:
        batch, _, channels = x.shape
        shortcut = x
        x = self.norm1(x).view(batch, height, width, channels)
        x = pad_to_multiple(x, self.size)
        padded_height, padded_width = x.shape[1:3]
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.size)
        windows = self.attn(windows, mask if self.shift > 0 else None)
        x = window_reverse(windows, self.size, padded_height, padded_width)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x[:, :height, :width, :].contiguous().view(batch, height * width, channels)
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """4 x 4 pixels to a token."""

    def __init__(self, dim: int, in_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        height, width = image.shape[-2:]
        x = self.proj(F.pad(image, (0, -width % 4, 0, -height % 4)))
        height, width = x.shape[-2:]
        return self.norm(x.flatten(2).transpose(1, 2)), height, width


class PatchMerging(nn.Module):
    """Four neighbours to one token of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        batch, _, channels = x.shape
        x = pad_to_multiple(x.view(batch, height, width, channels), 2)
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = torch.cat(
            [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1
        )
        return self.reduction(self.norm(x.view(batch, height * width, 4 * channels))), height, width
