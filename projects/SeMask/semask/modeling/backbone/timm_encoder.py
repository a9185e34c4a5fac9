"""Networks of the library timm as encoders, under timm's own parameter names."""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semask.errors import CheckpointError, ConfigError
from semask.modeling.backbone.contract import HierarchicalEncoder, Layout
from semask.modeling.layers.resize import up_to_multiple
from semask.utils.text import one_line

logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32)
# Licences of weights, by timm's names, that do not restrict the use of a model.
_FREE_LICENCES = ("apache-2.0", "bsd-3-clause", "mit")

# Forms of networks that timm also builds as a list of modules, where `feature_cfg` asks for it.
_LISTED_ON_DEMAND = ("EfficientNetFeatures", "MobileNetV3Features")
_AS_LIST = {"feature_cfg": {"flatten_sequential": True, "out_indices": (0, 1, 2, 3, 4)}}
# Forms of networks whose features are not those of one module after another.
_NOT_WALKED = {
    "FeatureGetterNet": "computes its features in one piece",
    "FeatureHookNet": "has features inside its modules",
}
_WORKING = "convnext_tiny, caformer_s18, pvt_v2_b2, mit_b0, mambaout_tiny or resnet50"
# Sides of the image on which a network is tried: not multiples of 32, nor of each other.
_TRIED_SIZE = (72, 100)


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
        timm = _import_timm()
        options: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        if in_channels != 3:
            options["in_chans"] = in_channels
        features = _features_net(timm, name, options)
        pretrained = pretrained and torch.empty(0).device.type != "meta"
        network = _create(timm, name, {**options, "pretrained": pretrained})
        self.pretrained = pretrained
        if pretrained:
            _log_licence(name, network)
        walk = [_timm_name(key, network) for key in features]
        ends = _ends_of_stages(name, features)
        # The stem ends before the module that returns the features of stride 4.
        starts = [ends[0] - 1, *ends[:-1]]
        channels = features.feature_info.channels()
        self.channels = tuple(channels[index] for index in _indices(features))[:num_stages]
        self.strides = STRIDES[:num_stages]
        self.layout: Layout = "NHWC" if features.output_fmt.value == "NHWC" else "NCHW"
        self.network = nn.Module()
        for timm_name in walk[: ends[num_stages - 1]]:
            _register(self.network, timm_name, network.get_submodule(timm_name))
        self.left_out = frozenset(network.state_dict()) - self.network.state_dict().keys()
        _without_in_place(self.network)

        def modules(start: int, end: int) -> list[nn.Module]:
            return [self.network.get_submodule(timm_name) for timm_name in walk[start:end]]

        least_sides, stem_layout = _try_out(name, features, starts, ends, self.layout, in_channels)
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


class PaddedSequence(nn.Module):
    """Modules in a row, on a map that is zero-padded to a multiple of some number.

    Args:
        modules: in order.
        multiple: of the height and width.
        layout: of the map.
        least: the smallest height and width that the modules can take.
        output_layout: of the map that they give; None = ``layout``.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        multiple: int,
        layout: Layout,
        least: int = 1,
        output_layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.multiple = multiple
        self.layout = layout
        self.least = least
        self.output_layout = output_layout or layout

    def forward(self, x: Tensor) -> Tensor:
        """A map in ``layout``, (B, H, W, C) or (B, C, H, W), to the output of the last module."""
        height, width = _size(x, self.layout)
        x = _padded(x, self.multiple, self.layout, self.least)
        for part in self.parts:
            x = part(x)
        if height >= self.least and width >= self.least:
            return x
        rows, columns = (-(-side // self.multiple) for side in (height, width))
        is_nhwc = self.output_layout == "NHWC"
        return x[:, :rows, :columns] if is_nhwc else x[..., :rows, :columns]


def _size(x: Tensor, layout: Layout) -> tuple[int, int]:
    return (x.shape[1], x.shape[2]) if layout == "NHWC" else (x.shape[2], x.shape[3])


def _padded(x: Tensor, multiple: int, layout: Layout, least: int = 1) -> Tensor:
    if multiple == least == 1:
        return x
    height, width = _size(x, layout)
    rows, columns = (
        least if side < least else up_to_multiple(side, multiple) for side in (height, width)
    )
    channels = (0, 0) if layout == "NHWC" else ()
    return F.pad(x, (*channels, 0, columns - width, 0, rows - height))


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


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            "MODEL.TIMM needs the library timm: install it with \"pip install 'semask[timm]'\", "
            f"or 'pip install timm' ({error})."
        ) from error
    # It is registered with timm.
    import semask.modeling.backbone.mix_transformer  # noqa: F401

    return timm


def _features_net(timm: Any, name: str, options: Mapping[str, Any]) -> Any:
    """Timm's form of the network that gives features, without values.

    Raises:
        ConfigError: timm has no such network, or its stages cannot be walked.
    """
    if name.partition(".")[0].startswith("swin_"):
        raise ConfigError(
            f"MODEL.TIMM.NAME '{name}': Swin is this project's own, with MODEL.BACKBONE.NAME "
            "SeMaskSwin and MODEL.SWIN. Timm's form pads, shifts and shrinks its windows in "
            "another way than the Swin that detectors and segmentation models were trained with. "
            "Its weights can be used as MODEL.WEIGHTS there."
        )
    plain_name = name.rpartition("/")[2]
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(plain_name, timm.list_models(), n=3) or [_WORKING]
        raise ConfigError(
            f"MODEL.TIMM.NAME '{name}': timm has no such network. Similar names are: "
            f"{', '.join(near)}."
        )
    with torch.device("meta"):
        features = _create(timm, name, {**options, "features_only": True})
        if type(features).__name__ in _LISTED_ON_DEMAND:
            features = _create(timm, name, {**options, "features_only": True, **_AS_LIST})
    form = type(features).__name__
    if form != "FeatureListNet":
        why = _NOT_WALKED.get(form, "is not a sequence of modules")
        raise _refusal(name, f"it {why}, so its stages cannot be run separately")
    return features


def _create(timm: Any, name: str, options: Mapping[str, Any]) -> Any:
    """``timm.create_model``, with this project's errors.

    Raises:
        ConfigError: the network does not take the options, or has no features.
        CheckpointError: its weights cannot be fetched.
    """
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # timm, the Hub and the network each have exceptions of their own
        reason = one_line(error)[:200]
        if options.get("pretrained"):
            raise CheckpointError(
                f"The weights of MODEL.TIMM.NAME '{name}' cannot be downloaded or loaded "
                f"({reason}). Set MODEL.TIMM.PRETRAINED to False, and MODEL.WEIGHTS to a file that "
                "timm has published for it."
            ) from error
        if "drop_path_rate" in reason:
            raise ConfigError(
                f"MODEL.TIMM.DROP_PATH_RATE must be 0: '{name}' has no stochastic depth."
            ) from error
        raise _refusal(name, f"timm cannot make its features ({reason})") from error


def _refusal(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"MODEL.TIMM.NAME '{name}' cannot have semantic layers: {reason}. Use a network such as "
        f"{_WORKING}."
    )


def _indices(features: Any) -> list[int]:
    """Indices of timm's features with the four strides; of several with one stride, the last."""
    reductions: list[int] = list(features.feature_info.reduction())
    return [
        max(index for index, reduction in enumerate(reductions) if reduction == stride)
        for stride in STRIDES
    ]


def _ends_of_stages(name: str, features: Any) -> list[int]:
    """For each stage, the number of modules up to its features.

    Raises:
        ConfigError: a stride is missing.
    """
    reductions = features.feature_info.reduction()
    if not set(STRIDES) <= set(reductions):
        raise _refusal(
            name, f"its features have strides {reductions}, but {list(STRIDES)} are needed"
        )
    order, returned = list(features), list(features.return_layers)
    return [order.index(returned[index]) + 1 for index in _indices(features)]


def _timm_name(key: str, network: nn.Module) -> str:
    """The name in timm's network of a module of ``features_only``, which joins names by "_"."""
    children = dict(network.named_children())
    names = [
        f"{key[:place]}.{key[place + 1 :]}" for place, letter in enumerate(key) if letter == "_"
    ]
    nested = (
        name
        for name in names
        if isinstance(children.get(name.partition(".")[0]), nn.Sequential)
        and name.partition(".")[2] in dict(children[name.partition(".")[0]].named_children())
    )
    return key if key in children else next(nested)


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


def _try_out(
    name: str,
    features: Any,
    starts: Sequence[int],
    ends: Sequence[int],
    layout: Layout,
    in_channels: int,
) -> tuple[list[int], Layout]:
    """Check, by shapes alone, that a network takes images of any size.

    Returns:
        The smallest side of a map that each stage can take, and the layout of the stem's map.

    Raises:
        ConfigError: it does not.
    """
    modules: list[Callable[[Tensor], Tensor]] = list(features.eval().values())
    height, width = _TRIED_SIZE
    sizes, least_sides = [], []
    try:
        x = torch.empty(1, in_channels, height, width, device="meta")
        x = _padded(x, STRIDES[0], "NCHW")
        for module in modules[: starts[0]]:
            x = module(x)
        sides = [-(-side // STRIDES[0]) for side in _TRIED_SIZE]
        stem_layout: Layout = "NHWC" if list(x.shape[1:3]) == sides else "NCHW"
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
            multiple, own = (2, layout) if stage else (1, stem_layout)
            x = _padded(x, multiple, own)
            least_sides.append(_least_side(modules[start:end], x, multiple, own))
            for module in modules[start:end]:
                x = module(x)
            sizes.append(_size(x, layout))
    except (AttributeError, TypeError) as error:  # more than one map goes on
        raise _refusal(name, "its modules pass on more than one map") from error
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _refusal(name, "it does not accept images of any size") from error
    if sizes != [(-(-height // stride), -(-width // stride)) for stride in STRIDES]:
        raise _refusal(name, "its maps are not as large as the image divided by their strides")
    return least_sides, stem_layout


def _least_side(
    modules: Sequence[Callable[[Tensor], Tensor]], like: Tensor, multiple: int, layout: Layout
) -> int:
    """The smallest side of a map, up to that of ``like``, that a stage can take."""
    convolutions = [
        part
        for module in modules
        if isinstance(module, nn.Module)
        for part in module.modules()
        if isinstance(part, nn.Conv2d)
    ]
    hooks = [part.register_forward_pre_hook(_refuse_small) for part in convolutions]
    side = multiple
    while side < min(_size(like, layout)):
        size = (side, side)
        shape = (*size, like.shape[3]) if layout == "NHWC" else (like.shape[1], *size)
        x = like.new_empty(1, *shape)
        try:
            for module in modules:
                x = module(x)
            break
        except RuntimeError:
            side *= 2
    else:
        side = multiple
    for hook in hooks:
        hook.remove()
    return side


def _refuse_small(convolution: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise where a kernel is larger than its map, which on the meta device is no error."""
    assert isinstance(convolution, nn.Conv2d)
    if isinstance(convolution.padding, str):
        return
    extents = zip(
        inputs[0].shape[2:],
        convolution.padding,
        convolution.dilation,
        convolution.kernel_size,
        strict=True,
    )
    if any(side + 2 * padding <= step * (kernel - 1) for side, padding, step, kernel in extents):
        raise RuntimeError("the map is smaller than the kernel")
