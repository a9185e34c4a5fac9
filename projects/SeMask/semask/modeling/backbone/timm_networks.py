"""Which networks of timm can be run stage by stage, found by trying; the others are refused."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semask.errors import CheckpointError, ConfigError
from semask.modeling.backbone.contract import Layout
from semask.modeling.backbone.padded import map_size, pad_map
from semask.utils.text import one_line

STRIDES = (4, 8, 16, 32)

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


def import_timm() -> Any:
    """The library, with this project's networks registered.

    Raises:
        ConfigError: it is not installed.
    """
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


def features_net(timm: Any, name: str, options: Mapping[str, Any]) -> Any:
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
        features = create(timm, name, {**options, "features_only": True})
        if type(features).__name__ in _LISTED_ON_DEMAND:
            features = create(timm, name, {**options, "features_only": True, **_AS_LIST})
    form = type(features).__name__
    if form != "FeatureListNet":
        why = _NOT_WALKED.get(form, "is not a sequence of modules")
        raise _refusal(name, f"it {why}, so its stages cannot be run separately")
    return features


def create(timm: Any, name: str, options: Mapping[str, Any]) -> Any:
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


def feature_indices(features: Any) -> list[int]:
    """Indices of timm's features with the four strides; of several with one stride, the last."""
    reductions: list[int] = list(features.feature_info.reduction())
    return [
        max(index for index, reduction in enumerate(reductions) if reduction == stride)
        for stride in STRIDES
    ]


def ends_of_stages(name: str, features: Any) -> list[int]:
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
    return [order.index(returned[index]) + 1 for index in feature_indices(features)]


def timm_name_of(key: str, network: nn.Module) -> str:
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


def try_out(
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
        x = pad_map(x, STRIDES[0], "NCHW")
        for module in modules[: starts[0]]:
            x = module(x)
        sides = [-(-side // STRIDES[0]) for side in _TRIED_SIZE]
        stem_layout: Layout = "NHWC" if list(x.shape[1:3]) == sides else "NCHW"
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
            multiple, own = (2, layout) if stage else (1, stem_layout)
            x = pad_map(x, multiple, own)
            least_sides.append(_least_side(modules[start:end], x, multiple, own))
            for module in modules[start:end]:
                x = module(x)
            sizes.append(map_size(x, layout))
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
    while side < min(map_size(like, layout)):
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
