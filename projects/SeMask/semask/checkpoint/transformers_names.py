"""Conversion of Hugging Face transformers' names of Mask2Former and MaskFormer on Swin.

The results are the names of the original releases, for :mod:`.mask_models`.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_PIXELS = r"^model\.pixel_level_module\."
_ENCODER = _PIXELS + r"encoder\.(?:model\.)?"  # older conversions have "model."
_SWIN_BLOCK = _ENCODER + r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."
_DECODER = _PIXELS + r"decoder\."
_QUERIES = r"^model\.transformer_module\."
_LAYER = _QUERIES + r"decoder\.layers\.(\d+)\."

_OWN_BLOCK = r"backbone.layers.\1.blocks.\2."
_OWN_DECODER = "sem_seg_head.pixel_decoder."
_OWN_PREDICTOR = "sem_seg_head.predictor."
_OWN_ENCODER = _OWN_DECODER + r"transformer.encoder.layers.\1."
_OWN_LAYER = _OWN_PREDICTOR + r"transformer.decoder.layers.\1."

# (pattern at the start of a name, replacement); the first match applies.
_BACKBONE_RULES = (
    (_ENCODER + r"embeddings\.patch_embeddings\.projection\.", "backbone.patch_embed.proj."),
    (_ENCODER + r"embeddings\.norm\.", "backbone.patch_embed.norm."),
    (_SWIN_BLOCK + r"layernorm_before\.", _OWN_BLOCK + "norm1."),
    (_SWIN_BLOCK + r"layernorm_after\.", _OWN_BLOCK + "norm2."),
    (_SWIN_BLOCK + r"attention\.self\.", _OWN_BLOCK + "attn."),
    (_SWIN_BLOCK + r"attention\.output\.dense\.", _OWN_BLOCK + "attn.proj."),
    (_SWIN_BLOCK + r"intermediate\.dense\.", _OWN_BLOCK + "mlp.fc1."),
    (_SWIN_BLOCK + r"output\.dense\.", _OWN_BLOCK + "mlp.fc2."),
    (_ENCODER + r"encoder\.layers\.(\d+)\.downsample\.", r"backbone.layers.\1.downsample."),
)
_MASK2FORMER_RULES = (
    (_DECODER + r"(adapter_1|layer_1)\.0\.", _OWN_DECODER + r"\1."),
    (_DECODER + r"(adapter_1|layer_1)\.1\.", _OWN_DECODER + r"\1.norm."),
    (_DECODER + r"input_projections\.", _OWN_DECODER + "input_proj."),
    (_DECODER + "level_embed$", _OWN_DECODER + "transformer.level_embed"),
    (_DECODER + r"mask_projection\.", _OWN_DECODER + "mask_features."),
    (_DECODER + r"encoder\.layers\.(\d+)\.self_attn\.", _OWN_ENCODER + "self_attn."),
    (_DECODER + r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.", _OWN_ENCODER + "norm1."),
    (_DECODER + r"encoder\.layers\.(\d+)\.fc1\.", _OWN_ENCODER + "linear1."),
    (_DECODER + r"encoder\.layers\.(\d+)\.fc2\.", _OWN_ENCODER + "linear2."),
    (_DECODER + r"encoder\.layers\.(\d+)\.final_layer_norm\.", _OWN_ENCODER + "norm2."),
    (_QUERIES + r"queries_features\.", _OWN_PREDICTOR + "query_feat."),
    (_QUERIES + r"queries_embedder\.", _OWN_PREDICTOR + "query_embed."),
    (_QUERIES + r"level_embed\.", _OWN_PREDICTOR + "level_embed."),
    (_LAYER + r"self_attn\.", _OWN_PREDICTOR + r"transformer_self_attention_layers.\1.self_attn."),
    (
        _LAYER + r"self_attn_layer_norm\.",
        _OWN_PREDICTOR + r"transformer_self_attention_layers.\1.norm.",
    ),
    (
        _LAYER + r"cross_attn\.",
        _OWN_PREDICTOR + r"transformer_cross_attention_layers.\1.multihead_attn.",
    ),
    (
        _LAYER + r"cross_attn_layer_norm\.",
        _OWN_PREDICTOR + r"transformer_cross_attention_layers.\1.norm.",
    ),
    (_LAYER + r"fc1\.", _OWN_PREDICTOR + r"transformer_ffn_layers.\1.linear1."),
    (_LAYER + r"fc2\.", _OWN_PREDICTOR + r"transformer_ffn_layers.\1.linear2."),
    (_LAYER + r"final_layer_norm\.", _OWN_PREDICTOR + r"transformer_ffn_layers.\1.norm."),
    (_QUERIES + r"decoder\.layernorm\.", _OWN_PREDICTOR + "decoder_norm."),
    (
        _QUERIES + r"decoder\.mask_predictor\.mask_embedder\.(\d+)\.0\.",
        _OWN_PREDICTOR + r"mask_embed.layers.\1.",
    ),
    (r"^class_predictor\.", _OWN_PREDICTOR + "class_embed."),
)

_MASKFORMER_RULES = (
    (_DECODER + r"fpn\.stem\.0\.", _OWN_DECODER + "layer_4."),
    (_DECODER + r"fpn\.stem\.1\.", _OWN_DECODER + "layer_4.norm."),
    (_DECODER + r"fpn\.layers\.(\d+)\.proj\.0\.", _OWN_DECODER + r"adapter_<\1>."),
    (_DECODER + r"fpn\.layers\.(\d+)\.proj\.1\.", _OWN_DECODER + r"adapter_<\1>.norm."),
    (_DECODER + r"fpn\.layers\.(\d+)\.block\.0\.", _OWN_DECODER + r"layer_<\1>."),
    (_DECODER + r"fpn\.layers\.(\d+)\.block\.1\.", _OWN_DECODER + r"layer_<\1>.norm."),
    (_DECODER + r"mask_projection\.", _OWN_DECODER + "mask_features."),
    (_LAYER + r"self_attn\.", _OWN_LAYER + "self_attn."),
    (_LAYER + r"encoder_attn\.", _OWN_LAYER + "multihead_attn."),
    (_LAYER + r"fc1\.", _OWN_LAYER + "linear1."),
    (_LAYER + r"fc2\.", _OWN_LAYER + "linear2."),
    (_LAYER + r"self_attn_layer_norm\.", _OWN_LAYER + "norm1."),
    (_LAYER + r"encoder_attn_layer_norm\.", _OWN_LAYER + "norm2."),
    (_LAYER + r"final_layer_norm\.", _OWN_LAYER + "norm3."),
    (_QUERIES + r"decoder\.layernorm\.", _OWN_PREDICTOR + "transformer.decoder.norm."),
    (_QUERIES + r"queries_embedder\.", _OWN_PREDICTOR + "query_embed."),
    (_QUERIES + r"input_projection\.", _OWN_PREDICTOR + "input_proj."),
    (r"^class_predictor\.", _OWN_PREDICTOR + "class_embed."),
    (r"^mask_embedder\.(\d+)\.0\.", _OWN_PREDICTOR + r"mask_embed.layers.\1."),
)
_OUTPUT_NORM = re.compile(_PIXELS + r"encoder\.hidden_states_norms\.(stage)?(\d+)\.")
_UNUSED = re.compile(_ENCODER + r"layernorm\.")
# One matrix here, three there: (pattern, name of the one, order of the three).
_JOINED = (
    (re.compile(r"\.attn\.(query|key|value)\.(weight|bias)$"), r".attn.qkv.\2", "query key value"),
    (re.compile(r"attn\.([qkv])_proj\.(weight|bias)$"), r"attn.in_proj_\2", "q k v"),
)


def is_from_transformers(names: Iterable[str]) -> bool:
    """Whether a state dict is from one of transformers' two models."""
    return any(name.startswith("model.pixel_level_module.") for name in names)


def original_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers under the names of the original releases.

    The separate query, key and value matrices are concatenated. Names without a counterpart are
    unchanged, and the loader refuses them.

    Args:
        state_dict: of ``Mask2FormerForUniversalSegmentation`` or
            ``MaskFormerForInstanceSegmentation`` with a Swin.
    """
    mask2former = any(
        name.startswith("model.transformer_module.level_embed") for name in state_dict
    )
    rules = (*_BACKBONE_RULES, *(_MASK2FORMER_RULES if mask2former else _MASKFORMER_RULES))
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state_dict.items():
        if _UNUSED.match(name):
            continue
        original = _original_name(name, rules)
        for pattern, whole, _ in _JOINED:
            if match := pattern.search(original):
                parts.setdefault(pattern.sub(whole, original), {})[match[1]] = value
                break
        else:
            renamed[original] = value
    for name, three in parts.items():
        for _, _, order in _JOINED:
            if set(order.split()) == three.keys():
                renamed[name] = torch.cat([three[part] for part in order.split()])
    return renamed


def _original_name(name: str, rules: Iterable[tuple[str, str]]) -> str:
    if match := _OUTPUT_NORM.match(name):
        stage = int(match[2]) - (1 if match[1] else 0)  # newer conversions count from "stage1"
        return f"backbone.norm{stage}.{name[match.end() :]}"
    for pattern, replacement in rules:
        if re.match(pattern, name):
            name = re.sub(pattern, replacement, name)
            # transformers numbers the pyramid's levels from the coarsest, this project from the
            # finest.
            return re.sub(r"<(\d)>", lambda level: str(3 - int(level[1])), name)
    return name
