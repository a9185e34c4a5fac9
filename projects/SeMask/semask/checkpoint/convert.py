"""Conversion of checkpoints to this project's parameter names, and of tensor shapes to a model.

Supported are the published SeMask-FPN and Swin-FPN (``backbone.*`` and ``decode_head.*``, the names
of their segmentation framework), mask-classification models (see :mod:`.mask_models`), and
ImageNet-pretrained Swin (names of the backbone alone).
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from semask.checkpoint.mask_models import HEAD, convert_mask_model
from semask.checkpoint.swin_names import authors_names, own_backbone_name, present_name, with_stage
from semask.checkpoint.transformers_names import is_from_transformers, original_names
from semask.errors import CheckpointError

logger = logging.getLogger(__name__)

RGB = 3


class UnknownNamesError(CheckpointError):
    """The parameter names match no known kind of checkpoint."""


class ForeignSwinError(CheckpointError):
    """The parameter names are those of another library's Swin."""


class CheckpointKind(Enum):
    """The origin of a state dict."""

    SEMASK_FPN = "published SeMask-FPN"
    SWIN_FPN = "published Swin-FPN"
    SEMASK_MASKS = "published SeMask with a mask decoder"
    SWIN_MASKS = "published Mask2Former or MaskFormer with a plain Swin"
    TRANSFORMERS_MASKS = "transformers' Mask2Former or MaskFormer"
    IMAGENET_SWIN = "ImageNet-pretrained Swin"
    ENCODER = "pre-trained encoder"
    CONVERTED_SWIN = "ImageNet-pretrained Swin, by this project's names"
    NATIVE = "this project's own"


#: published mask-classification models
MASK_MODELS = (
    CheckpointKind.SEMASK_MASKS,
    CheckpointKind.SWIN_MASKS,
    CheckpointKind.TRANSFORMERS_MASKS,
)

# Buffers that a model computes.
_COMPUTED = ("relative_position_index", "attn_mask")

# (pattern, replacement), all applied to every name in this order.
_FPN_RULES = (
    (r"^decode_head\.conv_seg\.", "sem_seg_head.semantic_fpn.predictor."),
    (r"(scale_heads\.\d+\.\d+)\.conv\.", r"\1."),
    (r"(scale_heads\.\d+\.\d+)\.bn\.", r"\1.norm."),
    (r"^decode_head\.", "sem_seg_head.semantic_fpn."),
)

# Parameter names in every block of other libraries' Swins.
_LIBRARIES = {
    "MMSegmentation, MMDetection or MMPretrain": r"\.attn\.w_msa\.",
    "transformers": r"encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.",
    "torchvision": r"^(backbone\.)?features\.\d+\.\d+\.attn\.",
    "timm": r"^layers_\d+\.blocks\.\d+\.attn\.",
}


def convert_state_dict(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], CheckpointKind]:
    """Rename the parameters of a published checkpoint, or of an earlier release of this project.

    Args:
        state_dict: parameters by name; a common prefix "module." is removed.

    Returns:
        Parameters by this project's names, and the detected kind. Parameters that are not used here
        (ImageNet Swin's classifier ``head`` and its ``norm``) keep their names; buffers that a
        model computes are dropped. Tensors are not copied.

    Raises:
        CheckpointError: the names match no known kind, or two names map to the same one.
    """
    if state_dict and all(name.startswith("module.") for name in state_dict):
        state_dict = {name[len("module.") :]: value for name, value in state_dict.items()}
    state_dict = authors_names(state_dict)
    kind = find_kind(state_dict)
    if kind is CheckpointKind.TRANSFORMERS_MASKS:
        state_dict = original_names(state_dict)
    if kind in MASK_MODELS:
        return convert_mask_model(state_dict), kind
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.endswith(_COMPUTED):
            continue
        own_name = _convert_name(name, kind)
        if own_name in converted:
            raise CheckpointError(f"Two of its parameters map to '{own_name}'; one is '{name}'.")
        converted[own_name] = value
    return converted, kind


def find_kind(state_dict: Mapping[str, Tensor]) -> CheckpointKind:
    """Detect the kind from the names; see :func:`convert_state_dict`.

    Raises:
        ForeignSwinError: the names are those of another library's Swin.
        UnknownNamesError: the names are of no known kind.
    """
    names = list(state_dict)
    if is_from_transformers(names):
        return CheckpointKind.TRANSFORMERS_MASKS
    library = find_library(names)
    if library is not None:
        raise ForeignSwinError(
            f"Its parameter names are those of {library}'s Swin, which are not supported. Use the "
            "file published by Swin's authors, with names such as 'layers.0.blocks.0.attn.qkv'."
        )
    if any(name.startswith("backbone.layers.") for name in names):
        semantic = any(".class_injection." in name for name in names)
        if any(name.startswith(HEAD) for name in names):
            return CheckpointKind.SEMASK_MASKS if semantic else CheckpointKind.SWIN_MASKS
        return CheckpointKind.SEMASK_FPN if semantic else CheckpointKind.SWIN_FPN
    if any(re.match(r"layers\.\d+\.blocks\.\d+\.attn\.", name) for name in names):
        return CheckpointKind.IMAGENET_SWIN
    if any(
        re.match(r"(backbone\.)?(bottom_up\.)?(encoder\.)?stages\.\d+\.", name) for name in names
    ):
        alone = all(re.match(r"backbone\.(?!output_norms\.)", name) for name in names)
        return CheckpointKind.CONVERTED_SWIN if alone else CheckpointKind.NATIVE
    shown = ", ".join(names[:5]) or "nothing"
    raise UnknownNamesError(
        "The parameter names match no known kind of checkpoint "
        f"({', '.join(kind.value for kind in CheckpointKind)}); they are {shown}, ..."
    )


def find_library(names: Sequence[str]) -> str | None:
    """The library whose Swin has these parameter names; None for supported names."""
    for library, pattern in _LIBRARIES.items():
        if any(re.search(pattern, name) for name in names):
            return library
    # timm merges patches at the start of a stage, the original at the end.
    merging = {m.group(1) for n in names if (m := re.match(r"layers\.(\d+)\.downsample\.", n))}
    return "timm" if merging and "0" not in merging else None


def _convert_name(name: str, kind: CheckpointKind) -> str:
    if kind in (CheckpointKind.NATIVE, CheckpointKind.CONVERTED_SWIN):
        return present_name(name)
    if kind is CheckpointKind.IMAGENET_SWIN:
        return (
            name if name.startswith(("head.", "norm.")) else own_backbone_name(f"backbone.{name}")
        )
    name = own_backbone_name(name)
    for pattern, replacement in _FPN_RULES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\bscale_heads\.(\d)\.", with_stage("scale_heads.res{}."), name)


def below_pyramid(
    state_dict: Mapping[str, Tensor], model_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Prefix a Swin's parameters with ``bottom_up`` for a model with Detectron2's FPN.

    Args:
        state_dict: parameters by this project's names, those of the Swin as ``backbone.*``.
        model_state: the model's; with Detectron2's FPN, the Swin is ``backbone.bottom_up``.

    Returns:
        ``state_dict`` with the model's names.
    """
    pyramid = any(name.startswith("backbone.bottom_up.") for name in model_state)
    wrong = re.compile(r"^backbone\.(?!bottom_up\.)" if pyramid else r"(?!)")
    return {wrong.sub("backbone.bottom_up.", name): v for name, v in state_dict.items()}


def resize_bias_tables(
    state_dict: Mapping[str, Tensor], model_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Resize Swin's learned position tables for other window sizes or another image size.

    Relative position bias tables and absolute position embeddings of other shapes are resized
    bicubically (``align_corners=False``), as is usual for Swin.

    Args:
        state_dict: parameters by this project's names.
        model_state: the model's, for the shapes wanted.

    Returns:
        ``state_dict`` with those tensors replaced. Tables that cannot be resized, such as those
        with another number of heads, are unchanged, and the loader refuses them.
    """
    resized = dict(state_dict)
    for name, value in state_dict.items():
        wanted = model_state.get(name)
        if wanted is None or wanted.shape == value.shape or not value.is_floating_point():
            continue
        if name.endswith("relative_position_bias_table"):
            resized[name] = _resize_bias_table(value, wanted)
        elif name.endswith("absolute_pos_embed"):
            resized[name] = _resize_embedding(value, wanted)
    return resized


def _resize_bias_table(table: Tensor, wanted: Tensor) -> Tensor:
    """Resize (rows, heads) to another number of rows."""
    if table.ndim != 2 or table.shape[1] != wanted.shape[1]:
        return table
    old, new = _side(table.shape[0]), _side(wanted.shape[0])
    if not (old and new):
        return table
    grid = _bicubic(table.t().reshape(1, -1, old, old), (new, new))
    return grid.reshape(-1, new * new).t().contiguous()


def _resize_embedding(embedding: Tensor, wanted: Tensor) -> Tensor:
    """Resize (1, C, height, width), or (1, tokens, C) as in Swin classifiers, to the model's
    size.
    """
    grid = embedding
    if embedding.ndim == 3 and (side := _side(embedding.shape[1])):
        grid = embedding.transpose(1, 2).reshape(embedding.shape[0], -1, side, side)
    if grid.ndim != 4 or 0 in grid.shape or grid.shape[:2] != wanted.shape[:2]:
        return embedding
    return _bicubic(grid, wanted.shape[2:])


def _side(count: int) -> int:
    """The side of a square of this many tokens; 0 if it is not a square number."""
    side = round(count**0.5)
    return side if side * side == count else 0


def _bicubic(grid: Tensor, size: Sequence[int]) -> Tensor:
    single = grid if grid.dtype == torch.float64 else grid.float()  # not for every dtype
    resized = F.interpolate(single, size=tuple(size), mode="bicubic", align_corners=False)
    return resized.to(grid.dtype)


def adapt_channels(
    state_dict: Mapping[str, Tensor], model_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Adapt the first convolution of a pre-trained backbone to images of N channels.

    timm's rule: for one channel, the sum over the three; otherwise the three repeated to N, times 3
    / N. If all channels are equal, the features keep their scale.

    Args:
        state_dict: parameters by this project's names.
        model_state: the model's, for the shapes wanted.

    Returns:
        ``state_dict`` with this weight replaced.
    """
    adapted = dict(state_dict)
    for name, value in state_dict.items():
        wanted = model_state.get(name)
        if wanted is None or not name.startswith("backbone.") or value.ndim != 4:
            continue
        rest = (wanted.shape[0], *wanted.shape[2:]) == (value.shape[0], *value.shape[2:])
        if not rest or value.shape[1] != RGB or wanted.shape[1] == RGB:
            continue
        adapted[name] = adapt_weight(value, wanted.shape[1])
        logger.info(
            "'%s' was trained on RGB: its weights are %s for images of %d channels",
            name,
            "summed" if wanted.shape[1] == 1 else "repeated and scaled",
            wanted.shape[1],
        )
    return adapted


def adapt_weight(weight: Tensor, channels: int) -> Tensor:
    """Adapt the weight of a convolution over RGB to another number of channels.

    Args:
        weight: (O, 3, h, w).
        channels: N, at least 1.

    Returns:
        (O, N, h, w), of the same type.
    """
    values = weight.float()
    if channels == 1:
        return values.sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = values.repeat(1, math.ceil(channels / RGB), 1, 1)[:, :channels]
    return (repeated * (RGB / channels)).to(weight.dtype)
