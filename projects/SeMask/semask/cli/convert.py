"""``semask convert``: convert a checkpoint to this project's names, without training state."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semask.checkpoint import (
    CheckpointKind,
    SeMaskCheckpointer,
    convert_state_dict,
    read_checkpoint,
    write_checkpoint,
)
from semask.checkpoint.convert import UnknownNamesError
from semask.checkpoint.encoder_names import encoder_weights
from semask.checkpoint.reading import parameters_by_name
from semask.config import load_config
from semask.errors import CheckpointError
from semask.modeling.build import build_model
from semask.utils.text import first_of

_NEEDS_CONFIG = " The weights of a network of timm need --config, a model with that encoder."
# Names of the classifiers in timm and transformers.
_CLASSIFIERS = ("head.", "head_dist.", "fc.", "classifier.", "norm.", "norm_pre.")

# Last parts of the names of buffers that are computed from the architecture.
_COMPUTED = ("relative_position_index", "attn_mask")


def run(args: argparse.Namespace) -> int:
    """Convert the file and print a summary; returns the exit status."""
    print(
        convert(
            args.source,
            args.target,
            config=args.config,
            opts=args.opts,
            ema=args.ema,
            allow_pickle=args.allow_pickle,
        )
    )
    return 0


def convert(
    source: str,
    target: str,
    *,
    config: str | None = None,
    opts: Sequence[str] = (),
    ema: bool = False,
    allow_pickle: bool = False,
) -> str:
    """Convert a checkpoint file.

    Args:
        source: file or URL.
        target: output file, ending in ".pth" or ".safetensors".
        config: name or file of a config whose model the weights must fit.
        opts: overrides of the config, as KEY, VALUE, ...
        ema: use the averaged weights.
        allow_pickle: also read ".pkl" files with more than NumPy arrays, which can run arbitrary
            code.

    Returns:
        A summary of what was found, written and left out.

    Raises:
        CheckpointError: the source cannot be used, or the target cannot be written.
        ConfigError: the config cannot be used.
    """
    if not target.endswith((".pth", ".safetensors")):
        raise CheckpointError(f"Target '{target}' must end in .pth or .safetensors.")
    content = read_checkpoint(source, allow_pickle=allow_pickle)
    weights: dict[str, Tensor] = _averaged(source, content) if ema else content["model"]
    model = _build(config, opts) if config is not None else None
    converted, kind = _converted(weights, model, source)
    left_out = {
        "entries besides the weights": sorted({*content} - {"model"}),
        "the classifier": _classifier(kind, converted, weights),
        "buffers that the model computes": [name for name in weights if name.endswith(_COMPUTED)],
    }
    converted = {k: v for k, v in converted.items() if k not in left_out["the classifier"]}
    if model is not None:
        SeMaskCheckpointer(model).check_weights(converted, source)
    write_checkpoint(target, {"model": converted})
    lines = [f"Found: {kind.value}", f"Written to {target}: {len(converted)} tensors"]
    lines += [
        f"Left out, {what}: {first_of(names, 4)}" for what, names in left_out.items() if names
    ]
    return "\n".join(lines)


def _converted(
    weights: Mapping[str, Tensor], model: nn.Module | None, source: str
) -> tuple[dict[str, Tensor], CheckpointKind]:
    """The weights with this project's names, and their kind.

    Args:
        weights: of the source.
        model: of the config, if one was given.
        source: named in errors.

    Raises:
        CheckpointError: the names are not known.
    """
    encoder = encoder_weights(weights, model) if model is not None else None
    if encoder:
        return encoder, CheckpointKind.ENCODER
    try:
        converted, kind = convert_state_dict(weights)
    except UnknownNamesError as error:
        hint = "" if model else _NEEDS_CONFIG
        raise CheckpointError(f"Checkpoint '{source}': {error}{hint}") from error
    except CheckpointError as error:
        raise CheckpointError(f"Checkpoint '{source}': {error}") from error
    bare = kind is CheckpointKind.NATIVE and not any("backbone." in name for name in converted)
    if bare and model is None:
        raise CheckpointError(
            f"Checkpoint '{source}' is not a model of this project, but may be an encoder."
            f"{_NEEDS_CONFIG}"
        )
    return converted, kind


def _classifier(
    kind: CheckpointKind, converted: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> list[str]:
    """The names of an ImageNet classifier, which no model has."""
    if kind is CheckpointKind.IMAGENET_SWIN:
        return [name for name in converted if not name.startswith("backbone.")]
    if kind is CheckpointKind.ENCODER:
        return [name for name in weights if name.startswith(_CLASSIFIERS)]
    return []


def _averaged(source: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    average = content.get("ema")
    weights = average.get("model") if isinstance(average, Mapping) else None
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(
            f"Checkpoint '{source}' has no averaged weights: its run had SOLVER.EMA.ENABLED False."
        )
    return parameters_by_name(weights, source)


def _build(config: str, opts: Sequence[str]) -> nn.Module:
    """The model of a config, on the meta device."""
    cfg = load_config(config, opts)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)
