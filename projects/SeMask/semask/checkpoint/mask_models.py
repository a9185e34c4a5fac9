"""Published mask-classification models: parameter names, and checks of computed buffers.

MaskFormer (arXiv 2107.06278), Mask2Former (arXiv 2112.01527) and SeMask's four models with their
decoders use this project's names for the decoders, except for two older ones, and Swin's for the
backbone.
"""

import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from semask.checkpoint.swin_names import own_backbone_name
from semask.config import config_names
from semask.errors import CheckpointError
from semask.modeling.backbone.windows import relative_position_index

logger = logging.getLogger(__name__)

HEAD = "sem_seg_head."
PIXEL_DECODER = HEAD + "pixel_decoder."
PREDICTOR = HEAD + "predictor."

MASK_DECODERS = ("maskformer", "mask2former", "mask2former_fapn", "mask2former_msfapn")

# (pattern of a parameter name, decoder); the first match applies.
_DECODERS = (
    (PREDICTOR + "transformer.decoder.", "maskformer"),
    (PIXEL_DECODER + "align_2.", "mask2former_fapn"),
    (PIXEL_DECODER + "align_1.", "mask2former_msfapn"),
    (PREDICTOR + "transformer_cross_attention_layers.", "mask2former"),
)

# Their values follow from the model's number of classes.
_NO_OBJECT_WEIGHTS = "criterion.empty_weight"
_PIXEL_STATISTICS = ("pixel_mean", "pixel_std")


def find_decoder(names: Iterable[str]) -> str | None:
    """The decoder of a state dict, named as in config files.

    Args:
        names: of parameters, this project's or published ones.

    Returns:
        "maskformer", "mask2former", "mask2former_fapn", "mask2former_msfapn" or "fpn"; None if it
        has none of these.
    """
    names = list(names)
    if any(name.startswith((HEAD + "semantic_fpn.", "decode_head.")) for name in names):
        return "fpn"
    names = [own_head_name(name) for name in names]
    for start, decoder in _DECODERS:
        if any(name.startswith(start) for name in names):
            return decoder
    return None


# Shipped configs: backbones by the channels of the first stage and the blocks of the third;
# datasets and tasks by the number of classes, then by the number of queries.
_BACKBONES = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
_DATASETS = {
    150: ("ade20k", ""),
    19: ("cityscapes", ""),
    171: ("coco_stuff_10k", ""),
    100: ("ade20k", "_instance"),
    8: ("cityscapes", "_instance"),
    80: ("coco", "_instance"),
    133: ("coco", "_panoptic"),
}
_SEMANTIC_QUERIES = 100


def find_config(state_dict: Mapping[str, Tensor]) -> str | None:
    """The shipped config whose model has these parameters, such as "ade20k/swin_tiny_fpn".

    Args:
        state_dict: parameters by this project's names.

    Returns:
        Its name; None if no shipped config has this backbone and number of classes.
    """
    decoder = find_decoder(state_dict)
    stem = state_dict.get("backbone.encoder.stem.patch_embed.proj.weight")
    blocks = [re.search(r"\bstages\.2\.blocks\.(\d+)\.", name) for name in state_dict]
    depth = 1 + max((int(match[1]) for match in blocks if match), default=-1)
    classes, queries = 0, _SEMANTIC_QUERIES
    for name, value in state_dict.items():
        if name.endswith(".class_embed.bias"):
            classes = value.shape[0] - 1
        elif name.endswith(".semantic_fpn.predictor.bias"):
            classes = value.shape[0]
        elif name.endswith(".query_embed.weight"):
            queries = value.shape[0]
    size = None if stem is None else _BACKBONES.get((stem.shape[0], depth))
    if decoder is None or size is None or classes not in _DATASETS:
        return None
    dataset, task = _DATASETS[classes]
    if not task and queries != _SEMANTIC_QUERIES:
        task = "_panoptic"
    semantic = "semask_" if any(".semantic_layers." in name for name in state_dict) else ""
    config = f"{dataset}/{semantic}swin_{size}_{decoder}{task}"
    return config if config in config_names() else None


def own_head_name(name: str) -> str:
    """The current name of a decoder's parameter; other names are returned unchanged.

    The first original releases put the pixel decoder directly in the head, and named the learnt
    query features ``static_query``.
    """
    if name.startswith(HEAD) and not name.startswith((PIXEL_DECODER, PREDICTOR)):
        name = PIXEL_DECODER + name[len(HEAD) :]
    return name.replace(PREDICTOR + "static_query.", PREDICTOR + "query_feat.")


def convert_mask_model(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a published mask-classification model.

    Buffers that a model computes are compared with their formula and dropped. The normalisation
    that feature alignment shares with the next convolution has two names there; the convolution's
    is used.

    Args:
        state_dict: parameters by their published names.

    Returns:
        Parameters by this project's names; tensors are not copied.

    Raises:
        CheckpointError: two parameters map to the same name, or a buffer differs from what a model
            computes.
    """
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if _is_computed(name, value):
            continue
        own_name = own_backbone_name(name) if name.startswith("backbone.") else own_head_name(name)
        if own_name in converted:
            raise CheckpointError(f"Two of its parameters map to '{own_name}'; one is '{name}'.")
        converted[own_name] = value
    return _with_shared_norms(converted)


def _is_computed(name: str, value: Tensor) -> bool:
    """Whether a model computes this buffer.

    Raises:
        CheckpointError: the buffer has other values than the model computes.
    """
    if name in _PIXEL_STATISTICS:
        return True
    if name.endswith(".relative_position_index"):
        side = round(value.shape[0] ** 0.5)
        expected = relative_position_index(side)
    elif name == _NO_OBJECT_WEIGHTS:
        expected = torch.ones_like(value)
        expected[-1] = value[-1]  # the weight of "no object" comes from the config
    else:
        return False
    if not torch.equal(value, expected.to(value)):
        raise CheckpointError(
            f"Its buffer '{name}' has other values than this model computes: it was written by "
            "another implementation, or is damaged."
        )
    return True


def _with_shared_norms(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in list(state_dict.items()):
        shared = re.sub(r"\.align_(\d+)\.offset\.norm\.", r".layer_\1.norm.", name)
        if shared == name or shared not in state_dict:
            continue
        if not torch.equal(value, state_dict[shared]):
            logger.warning(
                "The checkpoint's '%s' and '%s' are one parameter under two names and differ; the "
                "second one is used.",
                name,
                shared,
            )
        state_dict[name] = state_dict[shared]
    return state_dict
