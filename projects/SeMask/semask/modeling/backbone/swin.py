"""The parts of a Swin transformer (arXiv 2103.14030). Token maps are (B, H, W, C)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from semask.modeling.backbone.attention import WindowAttention
from semask.ops.recomputed import Call, call, recomputed
from semask.ops.tracing import evaluated, trained
from semask.ops.window import (
    CHUNK_TOKENS,
    WindowLayout,
    WindowPart,
    gather_windows,
    map_parts,
    scatter_windows,
)


class PatchEmbed(nn.Module):
    """Image to tokens: zero-pad to a multiple of the patch, convolve, normalise.

    Args:
        embed_dim: channels C.
        in_channels: of the image.
        patch_size: side of a patch, in pixels.
        chunked: without gradients, take a few rows at a time.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        in_channels: int = 3,
        patch_size: int = 4,
        chunked: bool = False,
    ) -> None:
        super().__init__()
        self.chunked = chunked
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, ceil(H / patch), ceil(W / patch), C)."""
        if self.chunked and evaluated(self):
            return in_bands(self._embed, image, dim=2, stride=self.patch_size)
        return self._embed(image)

    def _embed(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        bottom, right = -height % self.patch_size, -width % self.patch_size
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Half the height and width, twice the channels; odd sides are zero-padded.

    Args:
        dim: channels C.
        chunked: without gradients, take a few rows at a time.
    """

    def __init__(self, dim: int, *, chunked: bool = False) -> None:
        super().__init__()
        self.chunked = chunked
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2C)."""
        if self.chunked and evaluated(self):
            return in_bands(self._merge, x, dim=1, stride=2)
        return self._merge(x)

    def _merge(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
            height, width = x.shape[1:3]
        # (even row, even column), (odd, even), (even, odd), (odd, odd)
        pairs = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(pairs.reshape(batch, height // 2, width // 2, 4 * dim)))


def in_bands(layer: Callable[[Tensor], Tensor], x: Tensor, *, dim: int, stride: int) -> Tensor:
    """``layer(x)`` for a layer that makes each row of tokens of ``stride`` rows of its input.

    Args:
        layer: pads the last rows itself.
        x: an image (B, 3, H, W) or a map (B, H, W, C).
        dim: the one of H.
        stride: see above.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C).
    """
    tokens_of_row = x.shape[0] * -(-x.shape[dim + 1] // stride)
    step = stride * max(1, CHUNK_TOKENS // tokens_of_row)
    if step >= x.shape[dim]:
        return layer(x)
    out: Tensor | None = None
    for index, part in enumerate(x.split(step, dim)):
        tokens = layer(part)
        if out is None:
            rows = -(-x.shape[dim] // stride)
            out = tokens.new_empty(len(tokens), rows, *tokens.shape[2:])
        start = index * step // stride
        out[:, start : start + tokens.shape[1]] = tokens
    assert out is not None  # a map has a row
    return out


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a residual branch of whole samples."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return x if scale is None else x * scale

    def scale(self, x: Tensor) -> Tensor | None:
        """What each sample of x (B, ...) is multiplied by: (B, 1, ...), drawn anew; None = 1."""
        if not self.training or self.rate == 0.0:
            return None
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return mask.div_(keep)

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
        chunked: without gradients, go through the map a few windows at a time.
        recomputed: in training, too, and keep nothing but the input: see :mod:`.recomputed`.
            With dropout, whose choices would have to be kept, it has no effect, nor where a
            parameter has a hook, which would be called for each part. Hooks of the layers inside
            are called for each part, those of ``attn`` and ``mlp`` not at all.
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
        recomputed: bool = False,
    ) -> None:
        super().__init__()
        self.chunked = chunked
        self.recomputed = recomputed and not (dropout or attention_dropout)
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
        if self.chunked and evaluated(self):
            return self._evaluate(x)
        if self.recomputed and trained(self) and not self._has_hooked_parameters():
            return self._train(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _has_hooked_parameters(self) -> bool:
        return any(parameter._backward_hooks for parameter in self.parameters())

    def _evaluate(self, x: Tensor) -> Tensor:
        """The same a few windows at a time: they do not see each other."""
        layout = self.attn.layout(x)
        inputs = (self.attn.bias().contiguous(),)
        part = partial(self._part, layout, inputs=inputs)
        return map_parts(part, x.flatten(0, 2), layout).view_as(x)

    def _train(self, x: Tensor) -> Tensor:
        """The same, and again for the gradient."""
        layout = self.attn.layout(x)
        scales = [self.drop_path.scale(x) for _ in range(2)]
        inputs = [self.attn.bias().contiguous()]
        inputs += [
            each.expand(*x.shape[:3], 1).flatten(0, 2) for each in scales if each is not None
        ]
        table = self.attn.relative_position_bias_table
        parameters = [each for each in self.parameters() if each is not table]
        part = partial(self._part, layout)
        return recomputed(part, x.flatten(0, 2), layout, inputs, parameters).view_as(x)

    def _part(
        self,
        layout: WindowLayout,
        part: WindowPart,
        x: Tensor,
        inputs: Sequence[Tensor],
        call_last: Call = call,
    ) -> Tensor:
        """What becomes of the tokens (n, C) of some windows.

        Args:
            layout: of all windows.
            part: which of them.
            x: their tokens.
            inputs: the position bias, and with stochastic depth the scales (B * H * W, 1) of the
                two branches.
            call_last: how the last linear layer is computed.
        """
        bias, *scales = inputs
        attn, mlp = self.attn, self.mlp
        qkv = gather_windows(attn.project(self.norm1(x)), part)
        attended = attn.attend(qkv, attn.masked(bias, layout, part.windows))
        branch = attn.proj(scatter_windows(attended, part))
        x = x + (branch * part.take(scales[0]) if scales else branch)
        branch = call_last(mlp.fc2, F.gelu(mlp.fc1(self.norm2(x))))
        return x + (branch * part.take(scales[1]) if scales else branch)
