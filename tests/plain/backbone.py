"""Swin stages, each followed by a semantic layer (arXiv 2112.12782, section 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .swin import (
    PatchEmbed,
    PatchMerging,
    SwinBlock,
    pad_to_multiple,
    shifted_window_mask,
    window_partition,
    window_reverse,
)


class SemanticAttention(nn.Module):
    """Softmax over tokens of Sq Sk^T, applied to the values; (B, tokens, C) each."""

    def __init__(self, dim: int, classes: int, drop: float) -> None:
        super().__init__()
        self.query = nn.Linear(dim, classes)
        self.key = nn.Linear(dim, classes)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = self.query(x)
        key = self.key(x)
        value = self.value(x)
        attention = (query @ key.transpose(-2, -1)).softmax(dim=-1)
        return self.gamma * self.drop(self.proj(attention @ value)) + x, query


class SemanticLayer(nn.Module):
    """One LayerNorm, then chained semantic attention, in windows or over the whole map."""

    def __init__(self, dim: int, classes: int, size: int | None, blocks: int, drop: float) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(SemanticAttention(dim, classes, drop) for _ in range(blocks))

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        batch, _, channels = x.shape
        x = self.norm(x)
        if self.size is None:
            for block in self.blocks:
                x, prior = block(x)
            return x, prior
        padded = pad_to_multiple(x.view(batch, height, width, channels), self.size)
        windows = window_partition(padded, self.size)
        for block in self.blocks:
            windows, prior = block(windows)
        maps = []
        for tokens in (windows, prior):
            tokens = window_reverse(tokens, self.size, *padded.shape[1:3])
            tokens = tokens[:, :height, :width, :].contiguous()
            maps.append(tokens.view(batch, height * width, -1))
        return maps[0], maps[1]


class Stage(nn.Module):
    """Swin blocks and, where there is one, the semantic layer behind them."""

    def __init__(self, blocks: Sequence[SwinBlock], semantic_layer: SemanticLayer | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.semantic_layer = semantic_layer
        self.size, self.shift = blocks[-1].size, max(block.shift for block in blocks)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor | None]:
        mask = None
        if self.shift > 0:
            mask = shifted_window_mask(height, width, self.size, self.shift, like=x)
        for block in self.blocks:
            x = block(x, height, width, mask)
        return (x, None) if self.semantic_layer is None else self.semantic_layer(x, height, width)


class PlainBackbone(nn.Module):
    """Image (B, 3, H, W) to features and prior maps, by the names "res2".. and "prior2"..."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        semantic_attention: Sequence[str],
        semantic_blocks: Sequence[int],
        semantic_classes: int,
        semantic_window_size: int | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.3,
        semantic_dropout: float = 0.1,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dim, in_channels)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        self.stages = nn.ModuleList()
        for stage, dim in enumerate(dims):
            blocks = [
                SwinBlock(
                    dim,
                    num_heads[stage],
                    window_size,
                    0 if block % 2 == 0 else window_size // 2,
                    mlp_ratio=mlp_ratio,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rates[sum(depths[:stage]) + block],
                )
                for block in range(depths[stage])
            ]
            layer = None
            if semantic_attention[stage] != "none" and semantic_blocks[stage] > 0:
                size = semantic_window_size or window_size
                layer = SemanticLayer(
                    dim,
                    semantic_classes,
                    size if semantic_attention[stage] == "window" else None,
                    semantic_blocks[stage],
                    semantic_dropout,
                )
            self.stages.append(Stage(blocks, layer))
        self.merging = nn.ModuleList(PatchMerging(dim) for dim in dims[:-1])
        self.output_norms = nn.ModuleDict(
            {f"res{stage + 2}": nn.LayerNorm(dim) for stage, dim in enumerate(dims)}
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x, height, width = self.patch_embed(image)
        x = self.pos_drop(x)
        outputs = {}
        for index, stage in enumerate(self.stages):
            x, prior = stage(x, height, width)
            feature = self.output_norms[f"res{index + 2}"](x)
            outputs[f"res{index + 2}"] = _as_map(feature, height, width)
            if prior is not None:
                outputs[f"prior{index + 2}"] = _as_map(prior, height, width)
            if index < len(self.merging):
                x, height, width = self.merging[index](x, height, width)
        return outputs


def _as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H * W, C) to (B, C, H, W)."""
    batch, _, channels = tokens.shape
    return tokens.view(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()
