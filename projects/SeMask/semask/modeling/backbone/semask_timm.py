"""``MODEL.BACKBONE.NAME: SeMaskTimm``: SeMask with a network of timm as its encoder."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from semask.errors import ConfigError
from semask.modeling.backbone.contract import num_stages_for
from semask.modeling.backbone.semask import SeMaskBackbone, check_stage_lists, semantic_arguments
from semask.modeling.backbone.timm_encoder import TimmEncoder
from semask.modeling.backbone.timm_networks import STRIDES


@BACKBONE_REGISTRY.register()
class SeMaskTimm(SeMaskBackbone):
    """A network of timm with semantic layers; without them it is the plain network.

    Arguments that are lists have one entry per stage, of which there are four.
    :class:`SeMaskBackbone` explains those that are not listed here.

    Args:
        name, pretrained, drop_path_rate, in_channels: see :class:`TimmEncoder`.
        out_features: names among "res2".."res5"; later stages are left out.

    Raises:
        ConfigError: lists of different lengths, a value out of its range, or see
            :class:`TimmEncoder`.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        pretrained: bool = False,
        drop_path_rate: float = 0.0,
        in_channels: int = 3,
        semantic_attention: Sequence[str] = ("window", "window", "global", "global"),
        semantic_blocks: Sequence[int] = (1, 1, 1, 1),
        semantic_classes: int = 0,
        semantic_window_size: int = 7,
        semantic_dropout: float = 0.1,
        semantic_init: str = "live",
        semantic_norm: str = "branch",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        activation_checkpoint: Sequence[bool] = (False, False, False, False),
    ) -> None:
        check_stage_lists(
            {
                "The network of MODEL.TIMM.NAME": STRIDES,
                "MODEL.SEMASK.ATTENTION": semantic_attention,
                "MODEL.SEMASK.NUM_BLOCKS": semantic_blocks,
                "MODEL.TIMM.ACTIVATION_CHECKPOINT": activation_checkpoint,
            }
        )
        if not name:
            raise ConfigError(
                "MODEL.TIMM.NAME is empty: set it to the name of a network, such as convnext_tiny."
            )
        if not 0 <= drop_path_rate < 1:
            raise ConfigError(f"MODEL.TIMM.DROP_PATH_RATE must be in [0, 1), got {drop_path_rate}")
        num_stages = num_stages_for(out_features, len(STRIDES))
        super().__init__(
            encoder=TimmEncoder(
                name,
                pretrained=pretrained,
                drop_path_rate=drop_path_rate,
                num_stages=num_stages,
                in_channels=in_channels,
            ),
            semantic_attention=semantic_attention[:num_stages],
            semantic_blocks=semantic_blocks[:num_stages],
            semantic_classes=semantic_classes,
            semantic_window_size=semantic_window_size,
            semantic_dropout=semantic_dropout,
            semantic_init=semantic_init,
            semantic_norm=semantic_norm,
            out_features=out_features,
            freeze_at=freeze_at,
            activation_checkpoint=activation_checkpoint[:num_stages],
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        timm = cfg.MODEL.TIMM
        return {
            "name": timm.NAME,
            # MODEL.WEIGHTS takes precedence.
            "pretrained": timm.PRETRAINED and not cfg.MODEL.WEIGHTS,
            "drop_path_rate": timm.DROP_PATH_RATE,
            "in_channels": input_shape.channels,
            **semantic_arguments(cfg, timm, window_size=7, norm="branch"),
        }
