"""Names of Swin's parameters in libraries, in the original releases, and in this project.

Supported are timm, transformers, torchvision, OpenMMLab (mmpretrain, mmdetection, mmsegmentation),
the self-supervised MoBY and SimMIM, training frameworks that add the prefix "model.", Swin's and
SeMask's original releases, and earlier releases of this project.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from semask.errors import CheckpointError

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _numbered(template: str, shift: int) -> Callable[[re.Match[str]], str]:
    """A replacement from the pattern's first group and its second, a number, plus ``shift``."""
    return lambda match: template.format(match.group(1), int(match.group(2)) + shift)


# (pattern, replacement); all of a list are applied to every name, in order.
_IN_BACKBONE = r"^((?:backbone\.)?(?:bottom_up\.)?)"
# Names of this project from before the encoder was a separate module.
_FORMER_RULES: tuple[Rule, ...] = (
    (_IN_BACKBONE + r"(patch_embed\.|absolute_pos_embed$)", r"\1encoder.stem.\2"),
    (_IN_BACKBONE + r"merging\.(\d+)\.", _numbered("{}encoder.stages.{}.downsample.", 1)),
    (_IN_BACKBONE + r"stages\.(\d+)\.semantic_layer\.", _numbered("{}semantic_layers.res{}.", 2)),
    (_IN_BACKBONE + r"stages\.", r"\1encoder.stages."),
)
_PUBLISHED_RULES: tuple[Rule, ...] = (
    (r"\blayers\.(\d+)\.downsample\.", r"merging.\1."),
    (r"\blayers\.(\d+)\.", r"stages.\1."),
    *_FORMER_RULES,
    (r"(\bsemantic_layers\.\w+)\.norm1\.", r"\1.norm."),
    (r"\.class_injection\.(\d+)\.", r".blocks.\1."),
    (r"\.mlp_cls_q\.", ".query."),
    (r"\.mlp_cls_k\.", ".key."),
    (r"\.mlp_v\.", ".value."),
    (r"\.mlp_res\.", ".proj."),
    (r"^(backbone)\.norm(\d)\.", _numbered("{}.output_norms.res{}.", 2)),
)


def own_backbone_name(name: str) -> str:
    """This project's name of a backbone's parameter.

    Args:
        name: as published, with the prefix "backbone.".
    """
    return _apply(_PUBLISHED_RULES, name)


def present_name(name: str) -> str:
    """The current name of a parameter of an earlier release; most names are equal."""
    return _apply(_FORMER_RULES, name)


def has_former_names(names: Iterable[str]) -> bool:
    """Whether parameters have names from before the encoder was a separate module."""
    return any(present_name(name) != name for name in names)


def with_stage(template: str) -> Callable[[re.Match[str]], str]:
    """A replacement with Detectron2's number of the matched stage (stage 0 is 2)."""
    return lambda match: template.format(int(match.group(1)) + 2)


def _apply(rules: tuple[Rule, ...], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# What MoBY (arXiv 2105.04553) and SimMIM (arXiv 2111.09886) train besides the Swin, "encoder.*".
_SELF_SUPERVISED = re.compile(
    r"^(encoder_k|decoder|projector|projector_k|predictor)\."
    r"|^(queue\d*|queue_ptr|encoder\.mask_token)$"
)
_PREFIX = re.compile(
    r"^((?:(?:module|model|net|network|encoder|encoder_k|student|teacher|backbone)\.)+)"
    r"(?:layers\.\d+\.blocks\.\d+\."
    r"|features\.\d+\.\d+\.attn\."
    r"|stages\.\d+\.blocks\.\d+\.attn\.w_msa\.)"
)

_TORCHVISION = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^(features\.\d+\.\d+)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"^(features\.\d+\.\d+)\.mlp\.3\.", r"\1.mlp.fc2."),
)
_OPENMMLAB = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.", "layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^norm3\.", "norm."),
)
_TRANSFORMERS = (
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:self\.|relative_position_bias\.)?(relative_position)", r".attn.\1"),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def authors_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert any published form of a Swin to its authors' names.

    Args:
        state_dict: parameters by name.

    Returns:
        The converted state dict; unchanged if it is not a Swin, has the authors' names, or is a
        complete segmentation model. Tensors are copied if their channels have another order.

    Raises:
        CheckpointError: it is a Swin V2, which is not supported.
    """
    state = _without_prefix(dict(state_dict))
    if any(name.endswith((".logit_scale", ".cpb_mlp.0.weight")) for name in state):
        raise CheckpointError(
            "It is a Swin V2 (cosine attention, arXiv 2111.09883), and this project's Swin is the "
            "first version. Take weights of Swin-T, -S, -B or -L, such as "
            "swin_tiny_patch4_window7_224."
        )
    if any(re.match(r"(swin\.)?embeddings\.patch_embeddings\.", name) for name in state):
        return _from_transformers(state)
    if any(re.match(r"features\.\d+\.\d+\.attn\.relative_position_bias_table", n) for n in state):
        return _from_torchvision(state)
    if any(re.match(r"stages\.\d+\.blocks\.\d+\.attn\.w_msa\.", name) for name in state):
        return _from_openmmlab(state)
    if any(re.match(r"layers\.\d+\.blocks\.", name) for name in state):
        return _from_timm(state)
    return state


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix that a training framework adds to a Swin's names."""
    if any(_SELF_SUPERVISED.match(name) for name in state):
        state = {name: value for name, value in state.items() if not _SELF_SUPERVISED.match(name)}
    prefixes = {match[1] for name in state if (match := _PREFIX.match(name))}
    if len(prefixes) != 1:
        return state
    prefix = prefixes.pop()
    if prefix == "backbone." and not any(".attn.w_msa." in name for name in state):
        return state  # a complete segmentation model
    # transformers calls a part of its Swin "encoder".
    if any("embeddings.patch_embeddings." in name for name in state):
        return state
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Newer releases of timm merge patches at the start of a stage, not at the end of the previous
    one.
    """
    stages = [int(m[1]) for name in state if (m := re.match(r"layers\.(\d+)\.blocks\.", name))]
    last = f"layers.{max(stages)}.downsample."
    if not any(name.startswith(last) for name in state):
        return dict(state)

    def former(match: re.Match[str]) -> str:
        return f"layers.{int(match[1]) - 1}.downsample."

    return {
        re.sub(r"^layers\.(\d+)\.downsample\.", former, name): value
        for name, value in state.items()
    }


def _from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def stage(match: re.Match[str]) -> str:
        place = int(match[1])  # 1, 3, 5 and 7 are stages; 2, 4 and 6 merge patches
        return f"layers.{(place - 1) // 2}." + ("blocks." if place % 2 else "downsample.")

    renamed = _renamed(state, _TORCHVISION)
    return {re.sub(r"^features\.(\d+)\.", stage, name): value for name, value in renamed.items()}


def _from_openmmlab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Patches are merged by an unfold, which orders channels first, then neighbours."""
    renamed = _renamed(state, _OPENMMLAB)
    for name, value in renamed.items():
        if ".downsample." not in name:
            continue
        channels = value.shape[-1] // 4
        # The unfold orders by channel, row, column; the authors by column, row, channel.
        parts = value.unflatten(-1, (channels, 2, 2))
        renamed[name] = parts.movedim(-3, -1).transpose(-3, -2).flatten(-3)
    return renamed


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = _renamed(state, _TRANSFORMERS)
    for name in [name for name in renamed if ".attn.query." in name]:
        names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in renamed for part in names):
            joined = torch.cat([renamed.pop(part) for part in names])
            renamed[name.replace(".query.", ".qkv.")] = joined
    return renamed
