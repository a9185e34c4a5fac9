"""SeMask Swin: Swin stages, each followed by a semantic layer (arXiv 2112.12782, figure 2)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semask.modeling.backbone.base import (
    ATTENTION_KINDS,
    SemSegBackbone,
    has_semantic_layer,
    prior_name,
    stage_name,
    stage_stride,
)
from semask.modeling.backbone.semantic_layer import SemanticLayer
from semask.modeling.backbone.swin import PatchEmbed, PatchMerging, SwinBlock
from semask.ops.fast_paths import fast_paths
from semask.ops.malloc import keep_freed_memory


class SwinStage(nn.Module):
    """Swin blocks, then the semantic layer where the stage has one."""

    def __init__(self, blocks: Sequence[nn.Module], semantic_layer: SemanticLayer | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.semantic_layer = semantic_layer

    def forward(self, x: Tensor, return_prior: bool = True) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) to features of the same shape and prior logits (B, H, W, K) or None."""
        for block in self.blocks:
            x = block(x)
        return (x, None) if self.semantic_layer is None else self.semantic_layer(x, return_prior)


@BACKBONE_REGISTRY.register()
class SeMaskSwin(SemSegBackbone):
    """A Swin transformer with semantic layers; without any of them it is the plain Swin.

    Args (a list has one entry per stage):
        embed_dim: channels of the first stage, doubled at each following one.
        depths, num_heads: Swin blocks and attention heads.
        window_size: side of the attention window, in tokens.
        mlp_ratio: hidden width of the MLPs, relative to their channels.
        drop_rate, attn_drop_rate, drop_path_rate: dropout, attention dropout, and the rate that
            stochastic depth reaches in the last block, rising linearly from 0.
        absolute_pos_embed: add a learned position embedding made for images of side
            ``pretrain_image_size`` pixels, resized (bicubic) to the map at hand.
        semantic_attention: "window", "global" or "none".
        semantic_blocks: chained semantic attention blocks; 0 is the same as "none".
        semantic_classes: classes K of the prior maps; needed where a stage has a semantic layer.
        semantic_window_size: side of the semantic window; None = ``window_size``.
        semantic_dropout: dropout rate of the semantic layers.
        out_features: names among "res2".."res5"; stages behind the last one are not built.
        freeze_at: 0 = everything is trained, 1 = the patch embedding is frozen, 2 = also the
            first stage (Swin blocks, semantic layer, merging), and so on.
        activation_checkpoint: recompute the stage in the backward pass to save memory.
        sdpa, chunked, recomputed, folded: how the parts are computed, see :class:`SwinBlock` and
            :class:`SemanticLayer`.

    Raises:
        ValueError: lists of different lengths, or a value out of its range.
    """

    @configurable
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
        semantic_attention: Sequence[str] = ("window", "window", "global", "global"),
        semantic_blocks: Sequence[int] = (1, 1, 1, 1),
        semantic_classes: int = 0,
        semantic_window_size: int | None = None,
        semantic_dropout: float = 0.1,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        activation_checkpoint: Sequence[bool] = (False, False, False, False),
        in_channels: int = 3,
        sdpa: bool = False,
        chunked: bool = False,
        recomputed: bool = False,
        folded: bool = False,
    ) -> None:
        super().__init__()
        _check_stage_lists(
            {
                "MODEL.SWIN.DEPTHS": depths,
                "MODEL.SWIN.NUM_HEADS": num_heads,
                "MODEL.SEMASK.ATTENTION": semantic_attention,
                "MODEL.SEMASK.NUM_BLOCKS": semantic_blocks,
                "MODEL.SWIN.ACTIVATION_CHECKPOINT": activation_checkpoint,
            }
        )
        names = [stage_name(stage) for stage in range(len(depths))]
        _check_values(
            embed_dim=embed_dim,
            depths=depths,
            semantic_blocks=semantic_blocks,
            drop_path_rate=drop_path_rate,
            num_heads=num_heads,
            window_size=window_size,
            semantic_window_size=semantic_window_size,
            semantic_attention=semantic_attention,
            out_features=out_features,
            names=names,
            freeze_at=freeze_at,
        )
        semantic = [
            has_semantic_layer(*settings)
            for settings in zip(semantic_attention, semantic_blocks, strict=True)
        ]
        num_stages = 1 + max(names.index(name) for name in out_features)
        if any(semantic[:num_stages]) and semantic_classes < 1:
            raise ValueError(
                "Semantic layers need a number of classes: set MODEL.SEM_SEG_HEAD.NUM_CLASSES "
                f"(or MODEL.SEMASK.NUM_CLASSES) to at least 1, got {semantic_classes}"
            )

        self.freeze_at = freeze_at
        self.activation_checkpoint = list(activation_checkpoint)
        self.num_semantic_classes = semantic_classes if any(semantic[:num_stages]) else 0
        self._out_features = [name for name in names if name in out_features]
        dims = [embed_dim * 2**stage for stage in range(num_stages)]
        self._out_feature_channels = dict(zip(names, dims, strict=False))
        self._out_feature_strides = {name: stage_stride(i) for i, name in enumerate(names)}

        self.patch_embed = PatchEmbed(embed_dim=embed_dim, in_channels=in_channels, chunked=chunked)
        self.absolute_pos_embed: nn.Parameter | None = None
        if absolute_pos_embed:
            side = pretrain_image_size // self.patch_embed.patch_size
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, side, side))
        self.pos_drop = nn.Dropout(drop_rate)

        drop_path_rates = np.linspace(0, drop_path_rate, sum(depths)).tolist()
        self.stages = nn.ModuleList()
        for stage, dim in enumerate(dims):
            first = sum(depths[:stage])
            # The last stage's maps are small, and those of global semantic layers.
            recomputed_here = recomputed and stage < len(depths) - 1
            blocks = [
                SwinBlock(
                    dim=dim,
                    num_heads=num_heads[stage],
                    window_size=window_size,
                    shift=window_size // 2 if block % 2 else 0,
                    mlp_ratio=mlp_ratio,
                    dropout=drop_rate,
                    attention_dropout=attn_drop_rate,
                    drop_path=drop_path_rates[first + block],
                    sdpa=sdpa,
                    chunked=chunked,
                    recomputed=recomputed_here,
                )
                for block in range(depths[stage])
            ]
            semantic_layer = None
            if semantic[stage]:
                windowed = semantic_attention[stage] == "window"
                semantic_layer = SemanticLayer(
                    dim=dim,
                    num_classes=semantic_classes,
                    window_size=(semantic_window_size or window_size) if windowed else None,
                    num_blocks=semantic_blocks[stage],
                    dropout=semantic_dropout,
                    folded=folded,
                    chunked=chunked,
                    # Where the whole stage is recomputed, twice would be once too often.
                    recomputed=recomputed_here and windowed and not activation_checkpoint[stage],
                )
            self.stages.append(SwinStage(blocks, semantic_layer))
        self.merging = nn.ModuleList(PatchMerging(dim, chunked=chunked) for dim in dims[:-1])
        self.output_norms = nn.ModuleDict(
            {name: nn.LayerNorm(self._out_feature_channels[name]) for name in self._out_features}
        )
        self.init_weights()
        self._freeze()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        swin, semask, fast = cfg.MODEL.SWIN, cfg.MODEL.SEMASK, fast_paths(cfg)
        if "kept_memory" in fast:
            keep_freed_memory()
        return {
            "embed_dim": swin.EMBED_DIM,
            "depths": swin.DEPTHS,
            "num_heads": swin.NUM_HEADS,
            "window_size": swin.WINDOW_SIZE,
            "mlp_ratio": swin.MLP_RATIO,
            "drop_rate": swin.DROP_RATE,
            "attn_drop_rate": swin.ATTN_DROP_RATE,
            "drop_path_rate": swin.DROP_PATH_RATE,
            "absolute_pos_embed": swin.ABSOLUTE_POS_EMBED,
            "pretrain_image_size": swin.PRETRAIN_IMAGE_SIZE,
            "semantic_attention": semask.ATTENTION,
            "semantic_blocks": semask.NUM_BLOCKS,
            "semantic_classes": semask.NUM_CLASSES or cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "semantic_window_size": semask.WINDOW_SIZE or None,
            "semantic_dropout": semask.DROPOUT,
            "out_features": swin.OUT_FEATURES,
            "freeze_at": swin.FREEZE_AT,
            "activation_checkpoint": swin.ACTIVATION_CHECKPOINT,
            "in_channels": input_shape.channels,
            "sdpa": "sdpa" in fast,
            "chunked": "chunked" in fast,
            "recomputed": "recomputed" in fast,
            "folded": "folded" in fast,
        }

    def init_weights(self) -> None:
        """Truncated normal (std 0.02) linears and bias tables, zero biases and gammas."""
        for name, parameter in self.named_parameters():
            if name.endswith(("relative_position_bias_table", "absolute_pos_embed")):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor, return_priors: bool | None = None) -> dict[str, Tensor]:
        """See :meth:`SemSegBackbone.forward`."""
        if return_priors is None:
            return_priors = self.training
        x = self._embed(image)
        outputs: dict[str, Tensor] = {}
        for stage, layer in enumerate(self.stages):
            if self.activation_checkpoint[stage] and self.training and torch.is_grad_enabled():
                x, prior = checkpoint(layer, x, return_priors, use_reentrant=False)
            else:
                x, prior = layer(x, return_priors)
            name = stage_name(stage)
            if name in self.output_norms:
                outputs[name] = self.output_norms[name](x).permute(0, 3, 1, 2)
            if prior is not None:
                outputs[prior_name(stage)] = prior.permute(0, 3, 1, 2)
            if stage < len(self.merging):
                x = self.merging[stage](x)
        return outputs

    def _embed(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image)
        if self.absolute_pos_embed is not None:
            position = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic")
            x = x + position.permute(0, 2, 3, 1)
        return self.pos_drop(x)

    def train(self, mode: bool = True) -> "SeMaskSwin":
        """Frozen stages stay in evaluation mode: no dropout, no stochastic depth."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        if self.freeze_at < 1:
            return []
        frozen = self.freeze_at - 1
        return [self.patch_embed, self.pos_drop, *self.stages[:frozen], *self.merging[:frozen]]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if self.freeze_at > 0 and self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad_(False)
        self.train(self.training)


def _check_stage_lists(lists: dict[str, Sequence[Any]]) -> None:
    lengths = {key: len(values) for key, values in lists.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ValueError(f"These lists need one entry per stage, the same number each: {listed}")


def _check_values(
    *,
    embed_dim: int,
    depths: Sequence[int],
    semantic_blocks: Sequence[int],
    drop_path_rate: float,
    num_heads: Sequence[int],
    window_size: int,
    semantic_window_size: int | None,
    semantic_attention: Sequence[str],
    out_features: Sequence[str],
    names: Sequence[str],
    freeze_at: int,
) -> None:
    whole_numbers = {
        "MODEL.SWIN.EMBED_DIM": ([embed_dim], 1),
        "MODEL.SWIN.DEPTHS": (depths, 1),
        "MODEL.SWIN.NUM_HEADS": (num_heads, 1),
        "MODEL.SEMASK.NUM_BLOCKS": (semantic_blocks, 0),
    }
    for key, (values, least) in whole_numbers.items():
        if not all(isinstance(value, int) and value >= least for value in values):
            raise ValueError(f"{key} needs whole numbers of at least {least}, got {values}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"MODEL.SWIN.DROP_PATH_RATE must be in [0, 1), got {drop_path_rate}")
    for stage, heads in enumerate(num_heads):
        if (embed_dim * 2**stage) % heads:
            raise ValueError(
                f"MODEL.SWIN.NUM_HEADS[{stage}] = {heads} must divide the stage's "
                f"{embed_dim * 2**stage} channels (MODEL.SWIN.EMBED_DIM = {embed_dim})"
            )
    for key, size in (("SWIN", window_size), ("SEMASK", semantic_window_size)):
        if size is not None and size < 1:
            raise ValueError(f"MODEL.{key}.WINDOW_SIZE must be at least 1, got {size}")
    for stage, kind in enumerate(semantic_attention):
        if kind not in ATTENTION_KINDS:
            raise ValueError(
                f"MODEL.SEMASK.ATTENTION[{stage}] = {kind!r} is none of "
                + ", ".join(ATTENTION_KINDS)
            )
    unknown = [name for name in out_features if name not in names]
    if unknown or not out_features:
        raise ValueError(
            f"MODEL.SWIN.OUT_FEATURES = {list(out_features)} must name one or more of {list(names)}"
        )
    if not 0 <= freeze_at <= len(names) + 1:
        raise ValueError(f"MODEL.SWIN.FREEZE_AT must be 0 to {len(names) + 1}, got {freeze_at}")
