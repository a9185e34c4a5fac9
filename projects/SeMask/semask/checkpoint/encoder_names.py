"""Pre-trained weights of timm's networks, and of Mix Transformers, for a ``TimmEncoder``."""

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from semask.modeling.backbone.timm_encoder import TimmEncoder

logger = logging.getLogger(__name__)

# Names of transformers' SegFormer in release 5 and, in files, of earlier releases.
_TRANSFORMERS = (
    (r"^segformer\.(?:encoder\.)?|^encoder\.", ""),
    (r"^patch_embeddings\.(\d)\.", r"stages.\1.patch_embeddings."),
    (r"^block\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^layer_norm\.(\d)\.", r"stages.\1.norm."),
    (r"^(stages\.\d)\.layer_norm\.", r"\1.norm."),
    (r"\.patch_embeddings\.layer_norm\.", ".patch_embeddings.norm."),
    (r"^stages\.0\.patch_embeddings\.", "patch_embed."),
    (r"\.patch_embeddings\.", ".downsample."),
    (r"\.(?:layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(?:layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.sr."),
    (r"\.attention\.(?:self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"\.attn\.query\.", ".attn.q."),
    (r"^classifier\.", "head."),
)
# Names of this project, in a file written by ``semask convert``.
_OWN = re.compile(r"^backbone\.(bottom_up\.)?encoder\.network\.")
# Names of the authors of PVTv2 and SegFormer, with stages counted from 1.
_AUTHORS = (
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed([234])\.", "stages.{}.downsample."),
    (r"^block([1234])\.", "stages.{}.blocks."),
    (r"^norm([1234])\.", "stages.{}.norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)


def encoder_weights(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """Rename the parameters of a pre-trained encoder for a model with a ``TimmEncoder``.

    Args:
        state_dict: as published by timm, transformers, or the authors of a Mix Transformer or
            PVTv2.
        model: with or without the encoder.

    Returns:
        The parameters without the classifier's; None if the model has no such encoder, or the state
        dict is not of that encoder.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, TimmEncoder)]
    if not found:
        return None
    path, encoder = found[0]
    state = {re.sub(r"^(module|model)\.", "", name): v for name, v in state_dict.items()}
    if all(_OWN.match(name) for name in state):
        state = {_OWN.sub("", name): value for name, value in state.items()}
    pyramid = {"patch_embed1.proj.weight"} & state.keys()
    if pyramid:
        state = {_counted(name): value for name, value in state.items()}
    elif any("patch_embeddings.proj." in n or "patch_embeddings.0.proj." in n for n in state):
        state = _from_transformers(state)
        pyramid = {"patch_embed.proj.weight"}
    wanted = encoder.network.state_dict().keys()
    if 2 * len(wanted & state.keys()) < len(wanted):
        return None
    if pyramid and encoder.name.startswith("mit_"):
        logger.warning(
            "These weights are of the Mix Transformer that NVIDIA has published: its licence "
            "allows research and evaluation, no commercial use."
        )
    return {
        f"{path}.network.{name}" if name in wanted else name: value
        for name, value in state.items()
        if name not in encoder.left_out
    }


def _counted(name: str) -> str:
    for pattern, replacement in _AUTHORS:
        if match := re.search(pattern, name):
            stage = int(match[1]) - 1 if match.lastindex else 0
            name = name[: match.start()] + replacement.format(stage) + name[match.end() :]
    return name


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name in [name for name in renamed if ".attn.key." in name]:
        key, value = renamed.pop(name), renamed.pop(name.replace(".key.", ".value."))
        renamed[name.replace(".key.", ".kv.")] = torch.cat([key, value])
    return renamed
