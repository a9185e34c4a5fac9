"""Networks of the library timm as encoders, under timm's own parameter names."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from semask.modeling.backbone.contract import HierarchicalEncoder, Layout
from semask.modeling.backbone.padded import PaddedSequence
from semask.modeling.backbone.timm_networks import (
    STRIDES,
    create,
    ends_of_stages,
    feature_indices,
    features_net,
    import_timm,
    timm_name_of,
    try_out,
)

logger = logging.getLogger(__name__)

# Licences of weights, by timm's names, that do not restrict the use of a model.
_FREE_LICENCES = ("apache-2.0", "bsd-3-clause", "mit")


class TimmEncoder(HierarchicalEncoder):
    """A network of timm with features at strides 4, 8, 16 and 32, without its classifier.

    timm itself (``features_only``) defines which module belongs to which stage. On images whose
    sides are multiples of 32 the stages give exactly timm's features; others are zero-padded in
    front of each stage that halves the map. Mix Transformers and PVTv2 shrink the keys of their
    first stage to an eighth, by a convolution that needs 8 x 8 tokens: smaller maps are zero-padded
    to them, and the output is cropped.

    Args:
        name: timm's name of the network, with or without the tag of its weights, such as
            "convnext_tiny" or "convnext_tiny.dinov3_lvd1689m"; or "mit_b0" to "mit_b5" (see
            :mod:`semask.modeling.backbone.mix_transformer`).
        pretrained: start from timm's weights, from its cache or the Hub; not on the meta device.
        drop_path_rate: stochastic depth of the last block; 0 = the network's own default.
        num_stages: how many of the four stages are kept.
        in_channels: of the images. If not three, timm adapts the first layer's weights: their sum
            for one channel; else they repeat, times 3 / N.

    Attributes:
        name: as given.
        network: the modules, under timm's names.
        pretrained: whether it was built with timm's weights.
        left_out: names of parameters and buffers of timm's network that are not used here: those of
            its classifier.

    Raises:
        ConfigError: timm is not installed, does not know the network, or it does not fit.
        CheckpointError: the weights cannot be fetched or loaded.
    """

    name: str
    network: nn.Module
    left_out: frozenset[str]

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        drop_path_rate: float = 0.0,
        num_stages: int = len(STRIDES),
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.name = name
        self.weights_advice = (
            f"set MODEL.TIMM.PRETRAINED True, or MODEL.WEIGHTS to a file for {name}"
        )
        timm = import_timm()
        options: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        if in_channels != 3:
            options["in_chans"] = in_channels
        features = features_net(timm, name, options)
        pretrained = pretrained and torch.empty(0).device.type != "meta"
        network = create(timm, name, {**options, "pretrained": pretrained})
        self.pretrained = pretrained
        if pretrained:
            _log_licence(name, network)
        walk = [timm_name_of(key, network) for key in features]
        ends = ends_of_stages(name, features)
        # The stem ends before the module that returns the features of stride 4.
        starts = [ends[0] - 1, *ends[:-1]]
        channels = features.feature_info.channels()
        self.channels = tuple(channels[index] for index in feature_indices(features))[:num_stages]
        self.strides = STRIDES[:num_stages]
        self.layout: Layout = "NHWC" if features.output_fmt.value == "NHWC" else "NCHW"
        self.network = nn.Module()
        for timm_name in walk[: ends[num_stages - 1]]:
            _register(self.network, timm_name, network.get_submodule(timm_name))
        self.left_out = frozenset(network.state_dict()) - self.network.state_dict().keys()
        _without_in_place(self.network)

        def modules(start: int, end: int) -> list[nn.Module]:
            return [self.network.get_submodule(timm_name) for timm_name in walk[start:end]]

        least_sides, stem_layout = try_out(name, features, starts, ends, self.layout, in_channels)
        # Views of `network`: registered as well, each parameter would have two names.
        stem = PaddedSequence(modules(0, starts[0]), STRIDES[0], "NCHW")
        stages = nn.ModuleList(
            PaddedSequence(
                modules(start, end),
                2 if stage else 1,
                self.layout if stage else stem_layout,
                least,
                self.layout,
            )
            for stage, (start, end, least) in enumerate(zip(starts, ends, least_sides, strict=True))
            if stage < num_stages
        )
        self.__dict__.update(stem=stem, stages=stages)


def _log_licence(name: str, network: nn.Module) -> None:
    """Log the licence of pre-trained weights, which differs with the tag of the name."""
    published: Mapping[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    source = published.get("hf_hub_id") or published.get("url") or "timm"
    licence = published.get("license")
    named = f"licensed under '{licence}'" if licence else "under a licence that timm does not state"
    if licence in _FREE_LICENCES:
        logger.info("The weights of '%s' (%s) are %s.", name, source, named)
    else:
        logger.warning(
            "The weights of '%s' (%s) are %s: read it before you use the model.",
            name,
            source,
            named,
        )


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make ``module`` a submodule of ``root`` under a name with at most one dot."""
    parent, _, child = name.rpartition(".")
    if parent:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(child, module)


def _without_in_place(network: nn.Module) -> None:
    """A stage must not overwrite the map of the one before, which the decoder reads as well."""
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
