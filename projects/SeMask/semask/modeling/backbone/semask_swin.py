"""``MODEL.BACKBONE.NAME: SeMaskSwin``: SeMask with a Swin transformer as its encoder."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from semask.errors import ConfigError
from semask.modeling.backbone.contract import num_stages_for
from semask.modeling.backbone.semask import (
    SeMaskBackbone,
    check_stage_lists,
    check_whole_numbers,
    semantic_arguments,
)
from semask.modeling.backbone.swin import SwinTransformer

# The keys of MODEL.SWIN; other projects have a section of that name, too.
_KEYS = (
    *("EMBED_DIM", "DEPTHS", "NUM_HEADS", "WINDOW_SIZE", "MLP_RATIO", "DROP_RATE"),
    *("ATTN_DROP_RATE", "DROP_PATH_RATE", "ABSOLUTE_POS_EMBED", "PRETRAIN_IMAGE_SIZE"),
    *("OUT_FEATURES", "FREEZE_AT", "ACTIVATION_CHECKPOINT"),
)


@BACKBONE_REGISTRY.register()
class SeMaskSwin(SeMaskBackbone):
    """A Swin transformer with semantic layers; without them it is the plain Swin.

    Arguments that are lists have one entry per stage. :class:`SwinTransformer` and
    :class:`SeMaskBackbone` explain those that are not listed here.

    Args:
        semantic_window_size: side of the semantic window; None = ``window_size``.
        out_features: names among "res2".."res5"; later stages are not built.

    Raises:
        ConfigError: lists of different lengths, or a value out of its range.
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
        semantic_init: str = "live",
        semantic_norm: str = "stream",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        activation_checkpoint: Sequence[bool] = (False, False, False, False),
        in_channels: int = 3,
    ) -> None:
        check_stage_lists(
            {
                "MODEL.SWIN.DEPTHS": depths,
                "MODEL.SWIN.NUM_HEADS": num_heads,
                "MODEL.SEMASK.ATTENTION": semantic_attention,
                "MODEL.SEMASK.NUM_BLOCKS": semantic_blocks,
                "MODEL.SWIN.ACTIVATION_CHECKPOINT": activation_checkpoint,
            }
        )
        check_whole_numbers("MODEL.SWIN.EMBED_DIM", [embed_dim], 1)
        check_whole_numbers("MODEL.SWIN.DEPTHS", depths, 1)
        check_whole_numbers("MODEL.SWIN.NUM_HEADS", num_heads, 1)
        check_whole_numbers("MODEL.SWIN.WINDOW_SIZE", [window_size], 1)
        _check_heads(embed_dim, num_heads)
        if not 0 <= drop_path_rate < 1:
            raise ConfigError(f"MODEL.SWIN.DROP_PATH_RATE must be in [0, 1), got {drop_path_rate}")
        num_stages = num_stages_for(out_features, len(depths))
        encoder = SwinTransformer(
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            absolute_pos_embed=absolute_pos_embed,
            pretrain_image_size=pretrain_image_size,
            in_channels=in_channels,
            num_stages=num_stages,
        )
        super().__init__(
            encoder=encoder,
            semantic_attention=semantic_attention[:num_stages],
            semantic_blocks=semantic_blocks[:num_stages],
            semantic_classes=semantic_classes,
            semantic_window_size=(
                window_size if semantic_window_size is None else semantic_window_size
            ),
            semantic_dropout=semantic_dropout,
            semantic_init=semantic_init,
            semantic_norm=semantic_norm,
            out_features=out_features,
            freeze_at=freeze_at,
            activation_checkpoint=activation_checkpoint[:num_stages],
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        swin = cfg.MODEL.SWIN
        missing = [key for key in _KEYS if key not in swin]
        if missing:
            raise ConfigError(
                f"MODEL.SWIN has no {', '.join(missing)}: the section is of another project, whose "
                "function replaced this project's. Call semask.add_semask_config(cfg) after it."
            )
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
            **semantic_arguments(cfg, swin, window_size=None, norm="stream"),
            "in_channels": input_shape.channels,
        }


def _check_heads(embed_dim: int, num_heads: Sequence[int]) -> None:
    for stage, heads in enumerate(num_heads):
        if (embed_dim * 2**stage) % heads:
            raise ConfigError(
                f"MODEL.SWIN.NUM_HEADS[{stage}] = {heads} must divide the stage's "
                f"{embed_dim * 2**stage} channels (MODEL.SWIN.EMBED_DIM = {embed_dim})"
            )
