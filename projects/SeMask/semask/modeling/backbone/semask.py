"""SeMask: any hierarchical encoder with a semantic layer after each stage.

arXiv 2112.12782, section 3.1 and figure 2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from semask.errors import ConfigError
from semask.modeling.backbone.contract import (
    ATTENTION_KINDS,
    HierarchicalEncoder,
    SemSegBackbone,
    from_nhwc,
    has_semantic_layer,
    num_stages_for,
    prior_name,
    stage_name,
    to_nhwc,
)
from semask.modeling.backbone.semantic_layer import SemanticLayer, norm_placement


class SeMaskBackbone(SemSegBackbone):
    """The stages of an encoder, each followed by its semantic layer.

    The output of a semantic layer goes to the next stage and, normalised, to the decoder. Without
    semantic layers this is the plain encoder.

    Arguments that are lists have one entry per stage of the encoder.

    Args:
        encoder: see :class:`HierarchicalEncoder`; its last stage is the last of ``out_features``.
        semantic_attention: "window", "global" or "none".
        semantic_blocks: chained semantic attention blocks; 0 is the same as "none".
        semantic_classes: classes K of the prior maps; needed where a stage has a semantic layer.
        semantic_window_size: side of the semantic window, in tokens of the stage.
        semantic_dropout: dropout rate of the semantic layers.
        semantic_init: start of the semantic layers, "live" or "published"; see
            :meth:`SemanticLayer.init_weights`.
        semantic_norm: "stream" or "branch"; see :class:`SemanticLayer`. With "branch" and a gamma
            of 0 the encoder is exactly what it is without semantic layers.
        out_features: names among "res2", "res3", ...; "res2" is the output of the first stage.
        freeze_at: 0 = everything is trained, 1 = the stem is frozen, 2 = also the first stage
            with its semantic layer, and so on.
        activation_checkpoint: whether the stage is recomputed in the backward pass.

    Raises:
        ConfigError: lists of different lengths, or a value out of its range.
    """

    def __init__(
        self,
        *,
        encoder: HierarchicalEncoder,
        semantic_attention: Sequence[str],
        semantic_blocks: Sequence[int],
        semantic_classes: int = 0,
        semantic_window_size: int = 7,
        semantic_dropout: float = 0.1,
        semantic_init: str = "live",
        semantic_norm: str = "branch",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        activation_checkpoint: Sequence[bool] = (False, False, False, False),
    ) -> None:
        super().__init__()
        num_stages = len(encoder.stages)
        check_stage_lists(
            {
                "The encoder": encoder.channels,
                "MODEL.SEMASK.ATTENTION": semantic_attention,
                "MODEL.SEMASK.NUM_BLOCKS": semantic_blocks,
                "ACTIVATION_CHECKPOINT": activation_checkpoint,
            }
        )
        _check_semantic(semantic_attention, semantic_blocks, semantic_window_size)
        if num_stages_for(out_features, num_stages) < num_stages:
            raise ConfigError(
                f"The encoder has {num_stages} stages, and OUT_FEATURES {list(out_features)} "
                "needs fewer: parameters of the others would have no gradient."
            )
        if not 0 <= freeze_at <= num_stages + 1:
            raise ConfigError(f"FREEZE_AT must be 0 to {num_stages + 1}, got {freeze_at}")
        with_layer = [
            has_semantic_layer(*settings)
            for settings in zip(semantic_attention, semantic_blocks, strict=True)
        ]
        if any(with_layer) and semantic_classes < 1:
            raise ConfigError(
                "Semantic layers need a number of classes: set MODEL.SEM_SEG_HEAD.NUM_CLASSES "
                f"(or MODEL.SEMASK.NUM_CLASSES) to at least 1, got {semantic_classes}"
            )
        self.freeze_at = freeze_at
        self.activation_checkpoint = list(activation_checkpoint)
        self.num_semantic_classes = semantic_classes if any(with_layer) else 0
        self.names = [stage_name(stage) for stage in range(num_stages)]
        self._out_features = [name for name in self.names if name in out_features]
        self._out_feature_channels = dict(zip(self.names, encoder.channels, strict=True))
        self._out_feature_strides = dict(zip(self.names, encoder.strides, strict=True))
        self._prior_strides = {
            prior_name(stage): encoder.strides[stage]
            for stage in range(num_stages)
            if with_layer[stage]
        }

        self.encoder = encoder
        self.semantic_layers = nn.ModuleDict(
            {
                self.names[stage]: SemanticLayer(
                    dim=encoder.channels[stage],
                    num_classes=semantic_classes,
                    window_size=(
                        semantic_window_size if semantic_attention[stage] == "window" else None
                    ),
                    num_blocks=semantic_blocks[stage],
                    dropout=semantic_dropout,
                    init=semantic_init,
                    norm=semantic_norm,
                )
                for stage in range(num_stages)
                if with_layer[stage]
            }
        )
        self.output_norms = nn.ModuleDict(
            {name: nn.LayerNorm(self._out_feature_channels[name]) for name in self._out_features}
        )
        for module in self._frozen_parts():
            module.requires_grad_(False)
        self.train(self.training)

    @property
    def prior_strides(self) -> dict[str, int]:
        """See :attr:`SemSegBackbone.prior_strides`."""
        return dict(self._prior_strides)

    def forward(self, image: Tensor, return_priors: bool | None = None) -> dict[str, Tensor]:
        """See :meth:`SemSegBackbone.forward`."""
        if return_priors is None:
            return_priors = self.training
        x = self.encoder.stem(image)
        outputs: dict[str, Tensor] = {}
        for stage, name in enumerate(self.names):
            if self.activation_checkpoint[stage] and self.training and torch.is_grad_enabled():
                x, prior = self._checkpointed_stage(stage, x, return_priors)
            else:
                x, prior = self._through_stage(stage, x, return_priors)
            if name in self.output_norms:
                feature = self.output_norms[name](to_nhwc(x, self.encoder.layout))
                outputs[name] = feature.permute(0, 3, 1, 2)
            if prior is not None:
                outputs[prior_name(stage)] = prior.permute(0, 3, 1, 2)
        return outputs

    def _through_stage(
        self, stage: int, x: Tensor, return_prior: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The map after a stage and its semantic layer, and prior logits (B, H, W, K)."""
        x = self.encoder.stages[stage](x)
        if self.names[stage] not in self.semantic_layers:
            return x, None
        layer = self.semantic_layers[self.names[stage]]
        x, prior = layer(to_nhwc(x, self.encoder.layout), return_prior)
        return from_nhwc(x, self.encoder.layout), prior

    def _checkpointed_stage(
        self, stage: int, x: Tensor, return_prior: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`_through_stage`, and once more in the backward pass."""
        arguments: dict[str, Any] = {"use_reentrant": False}
        encoder_stage = self.encoder.stages[stage]
        # A compiler runs both passes in its own way, without a context.
        if _batch_norms(encoder_stage) and not torch.compiler.is_compiling():
            arguments["context_fn"] = lambda: (nullcontext(), fixed_statistics(encoder_stage))
        x, prior = checkpoint(self._through_stage, stage, x, return_prior, **arguments)
        return x, prior

    def train(self, mode: bool = True) -> "SeMaskBackbone":
        """Frozen stages stay in evaluation mode: no dropout, no stochastic depth."""
        super().train(mode)
        for module in self._frozen_parts():
            module.eval()
        return self

    def _frozen_parts(self) -> list[nn.Module]:
        if self.freeze_at < 1:
            return []
        num_stages = self.freeze_at - 1
        layers = [
            self.semantic_layers[name]
            for name in self.names[:num_stages]
            if name in self.semantic_layers
        ]
        return [*self.encoder.frozen_parts(num_stages), *layers]


def _batch_norms(module: nn.Module) -> list[_NormBase]:
    """Norms in training that keep running statistics."""
    return [
        part
        for part in module.modules()
        if isinstance(part, _NormBase) and part.training and part.track_running_stats
    ]


@contextmanager
def fixed_statistics(module: nn.Module) -> Iterator[None]:
    """A context in which BatchNorm normalises as in training, but keeps its running statistics.

    In a pass that repeats an earlier one, the batch would count twice.
    """
    kept = [(norm, dict(norm.named_buffers(recurse=False))) for norm in _batch_norms(module)]
    for norm, buffers in kept:
        for name, value in buffers.items():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, buffers in kept:
            for name, value in buffers.items():
                setattr(norm, name, value)


def check_stage_lists(lists: dict[str, Sequence[object]]) -> None:
    """Refuse lists that do not have one entry per stage.

    Args:
        lists: by the key that sets them.

    Raises:
        ConfigError: their lengths differ, or are 0.
    """
    lengths = {key: len(values) for key, values in lists.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ConfigError(f"These lists need one entry per stage, the same number each: {listed}")


def check_whole_numbers(key: str, values: Sequence[object], least: int) -> None:
    """Refuse values that are not whole numbers, or are too small.

    Raises:
        ConfigError: a value is not a whole number, or is less than ``least``.
    """
    if not all(isinstance(value, int) and value >= least for value in values):
        raise ConfigError(f"{key} needs whole numbers of at least {least}, got {values}")


def _check_semantic(attention: Sequence[str], num_blocks: Sequence[int], window_size: int) -> None:
    check_whole_numbers("MODEL.SEMASK.NUM_BLOCKS", num_blocks, 0)
    check_whole_numbers("MODEL.SEMASK.WINDOW_SIZE", [window_size], 1)
    for stage, kind in enumerate(attention):
        if kind not in ATTENTION_KINDS:
            raise ConfigError(
                f"MODEL.SEMASK.ATTENTION[{stage}] = {kind!r} is none of "
                + ", ".join(ATTENTION_KINDS)
            )


def semantic_arguments(
    cfg: CfgNode, encoder: CfgNode, *, window_size: int | None, norm: str
) -> dict[str, Any]:
    """The arguments of a backbone that do not depend on what its encoder is.

    Args:
        cfg: the config, with ``MODEL.SEMASK``.
        encoder: its section of the encoder.
        window_size: where ``MODEL.SEMASK.WINDOW_SIZE`` is 0.
        norm: "stream" or "branch", where ``MODEL.SEMASK.NORM`` is "auto".

    Raises:
        ConfigError: see :func:`norm_placement`.
    """
    semask = cfg.MODEL.SEMASK
    return {
        "semantic_attention": semask.ATTENTION,
        "semantic_blocks": semask.NUM_BLOCKS,
        "semantic_classes": semask.NUM_CLASSES or cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "semantic_window_size": semask.WINDOW_SIZE or window_size,
        "semantic_dropout": semask.DROPOUT,
        "semantic_init": semask.INIT,
        "semantic_norm": norm_placement(semask.NORM, default=norm),
        "out_features": encoder.OUT_FEATURES,
        "freeze_at": encoder.FREEZE_AT,
        "activation_checkpoint": encoder.ACTIVATION_CHECKPOINT,
    }
