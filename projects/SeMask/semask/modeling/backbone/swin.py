"""The Swin transformer (arXiv 2103.14030) as an encoder. Token maps are (B, H, W, C)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semask.modeling.backbone.contract import HierarchicalEncoder
from semask.modeling.backbone.windows import WindowAttention, pad_to_multiple
from semask.modeling.layers.resize import up_to_multiple


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a residual branch of whole samples.

    Args:
        rate: probability of dropping, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same shape; kept branches are scaled up, so the expected value stays."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Mlp(nn.Module):
    """Linear, GELU (exact), linear, along the last dimension.

    Args:
        dim: channels of input and output.
        hidden_dim: channels in between.
        dropout: rate behind each linear layer.
    """

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
        num_heads: attention heads, a divisor of C.
        window_size: side of the attention window, in tokens.
        shift: of the windows, in tokens; see :class:`WindowAttention`.
        mlp_ratio: hidden width of the MLP, relative to C.
        dropout: rate behind each linear layer.
        attention_dropout: rate on the attention weights.
        drop_path: rate of the stochastic depth.
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
    ) -> None:
        super().__init__()
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
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Image to tokens: zero-pad to a multiple of the patch, convolve, normalise.

    Args:
        embed_dim: channels C.
        in_channels: of the image.
        patch_size: side of a patch, in pixels.
    """

    def __init__(self, *, embed_dim: int, in_channels: int = 3, patch_size: int = 4) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, ceil(H / patch), ceil(W / patch), C)."""
        height, width = image.shape[-2:]
        rows, columns = (up_to_multiple(side, self.patch_size) for side in (height, width))
        image = F.pad(image, (0, columns - width, 0, rows - height))
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Half the height and width, twice the channels; odd sides are zero-padded.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2C)."""
        x = pad_to_multiple(x, 2)
        batch, height, width, dim = x.shape
        # (even row, even column), (odd, even), (even, odd), (odd, odd)
        pairs = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(pairs.reshape(batch, height // 2, width // 2, 4 * dim)))


class SwinStem(nn.Module):
    """Patch embedding, and optionally a learned embedding of the absolute position.

    Args:
        embed_dim: channels C.
        in_channels: of the image.
        dropout: rate at the end.
        position_side: side of the embedding's own map, in tokens; it is resized (bicubic) to the
            map. None = no position embedding.
    """

    PATCH_SIZE = 4

    def __init__(
        self,
        *,
        embed_dim: int,
        in_channels: int = 3,
        dropout: float = 0.0,
        position_side: int | None = None,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(
            embed_dim=embed_dim, in_channels=in_channels, patch_size=self.PATCH_SIZE
        )
        self.absolute_pos_embed: nn.Parameter | None = None
        if position_side is not None:
            shape = (1, embed_dim, position_side, position_side)
            self.absolute_pos_embed = nn.Parameter(torch.zeros(shape))
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, ceil(H / 4), ceil(W / 4), C)."""
        x = self.patch_embed(image)
        if self.absolute_pos_embed is not None:
            position = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic")
            x = x + position.permute(0, 2, 3, 1)
        return self.dropout(x)


class SwinStage(nn.Module):
    """Patch merging (except in the first stage), then Swin blocks.

    Args:
        downsample: patch merging in front of the blocks, or None.
        blocks: every other one with shifted windows.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C), or to (B, ceil(H / 2), ceil(W / 2), 2C)."""
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class SwinTransformer(HierarchicalEncoder):
    """Swin's stem and stages, without a classifier.

    Arguments that are lists have one entry per stage.

    Args:
        embed_dim: channels of the first stage, doubled at each following one.
        depths: Swin blocks.
        num_heads: attention heads.
        window_size: side of the attention window, in tokens.
        mlp_ratio: hidden width of the MLPs, relative to their channels.
        drop_rate: dropout behind linear layers.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: rate that stochastic depth reaches in the last block, rising linearly from
            0 in the first.
        absolute_pos_embed: add a learned position embedding made for images of side
            ``pretrain_image_size`` pixels.
        pretrain_image_size: see ``absolute_pos_embed``.
        in_channels: of the image.
        num_stages: how many of the stages are built; None = all of them.
    """

    layout = "NHWC"
    weights_advice = "set MODEL.WEIGHTS to an ImageNet Swin checkpoint"

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.3,
        absolute_pos_embed: bool = False,
        pretrain_image_size: int = 224,
        in_channels: int = 3,
        num_stages: int | None = None,
    ) -> None:
        super().__init__()
        num_stages = len(depths) if num_stages is None else num_stages
        self.channels = tuple(embed_dim * 2**stage for stage in range(num_stages))
        self.strides = tuple(SwinStem.PATCH_SIZE * 2**stage for stage in range(num_stages))
        self.stem = SwinStem(
            embed_dim=embed_dim,
            in_channels=in_channels,
            dropout=drop_rate,
            position_side=(
                pretrain_image_size // SwinStem.PATCH_SIZE if absolute_pos_embed else None
            ),
        )
        drop_path_rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList()
        for stage, dim in enumerate(self.channels):
            blocks = [
                SwinBlock(
                    dim=dim,
                    num_heads=num_heads[stage],
                    window_size=window_size,
                    shift=window_size // 2 if block % 2 else 0,
                    mlp_ratio=mlp_ratio,
                    dropout=drop_rate,
                    attention_dropout=attn_drop_rate,
                    drop_path=next(drop_path_rates),
                )
                for block in range(depths[stage])
            ]
            self.stages.append(SwinStage(PatchMerging(dim // 2) if stage else None, blocks))
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal (std 0.02) linears and position tables, zero biases."""
        for name, parameter in self.named_parameters():
            if name.endswith(("relative_position_bias_table", "absolute_pos_embed")):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def frozen_parts(self, num_stages: int) -> list[nn.Module]:
        """As in Detectron2's Swin, also the merging after the last frozen stage."""
        parts = super().frozen_parts(num_stages)
        if 0 < num_stages < len(self.stages):
            downsample = self.stages[num_stages].downsample
            assert isinstance(downsample, nn.Module)  # all stages except the first have one
            parts.append(downsample)
        return parts
