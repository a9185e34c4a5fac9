"""The parts of a Swin transformer (arXiv 2103.14030). Token maps are (B, H, W, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tracing import traced
from .attention import WindowAttention
from .window import CHUNK_TOKENS


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
        batch, height, width, dim = x.shape
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
            height, width = x.shape[1:3]
        # (even row, even column), (odd, even), (even, odd), (odd, odd)
        pairs = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(pairs.reshape(batch, height // 2, width // 2, 4 * dim)))


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


class SwinBlock(nn.Module):
    """Window attention and MLP, each with a normalised input and a residual connection.

    Args:
        dim: channels C.
        mlp_ratio: hidden width of the MLP, relative to C.
        drop_path: rate of the stochastic depth.
        chunked: without gradients, go through the map a few windows and a few tokens at a time.
        num_heads, window_size, shift, attention_dropout, dropout, sdpa: see
            :class:`WindowAttention`.
    """

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
        sdpa: bool = False,
        chunked: bool = False,
    ) -> None:
        super().__init__()
        self.chunked = chunked
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim=dim,
            num_heads=num_heads,
            window_size=window_size,
            shift=shift,
            attention_dropout=attention_dropout,
            dropout=dropout,
            sdpa=sdpa,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio), dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        if self.chunked and not (self.training or torch.is_grad_enabled() or traced()):
            return self._evaluate(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _evaluate(self, x: Tensor) -> Tensor:
        """The same in parts: windows do not see each other, and behind them no two tokens do."""
        attn = self.attn
        layout = attn.layout(x)
        tokens = attn.project(self.norm1(x))
        attended = x.new_empty(len(layout.gather), x.shape[3])
        bias = attn.bias().contiguous()
        step = max(1, CHUNK_TOKENS // attn.window_size**2)
        for start in range(0, layout.windows, step):
            part = slice(start, min(start + step, layout.windows))
            slots = slice(part.start * attn.window_size**2, part.stop * attn.window_size**2)
            qkv = tokens.index_select(0, layout.gather[slots])
            qkv = qkv.view(part.stop - part.start, -1, qkv.shape[1])
            attended[slots] = attn.attend(qkv, attn.masked(bias, layout, part)).flatten(0, 1)
        out = torch.empty_like(x)
        pieces = (each.split(CHUNK_TOKENS) for each in (x.flatten(0, 2), layout.scatter))
        for before, slots, after in zip(
            *pieces, out.flatten(0, 2).split(CHUNK_TOKENS), strict=True
        ):
            torch.add(before, attn.proj(attended.index_select(0, slots)), out=after)
            after += self.mlp(self.norm2(after))
        return out
