"""Partial loading: initialise a model with other classes, layers or another decoder."""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping

from detectron2.config import CfgNode
from torch import Tensor

from semask.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

WEIGHTS_MODES = ("strict", "initialise")

# Parameters with a row for each class, or for each query.
_CLASS_DEPENDENT = re.compile(
    r"\.semantic_layers\.\w+\.(blocks\.\d+\.)?(query|key)\."
    r"|\.predictor\.class_embed\."
    r"|^sem_seg_head\.(semantic_fpn\.)?predictor\.(weight|bias)$"
    r"|\.box_predictor\.|\.mask_head\.predictor\.|^head\.cls_score\."
)
_QUERIES = re.compile(r"\.predictor\.(query_feat|query_embed)\.")


def starts_partially(cfg: CfgNode) -> bool:
    """Whether ``MODEL.WEIGHTS_MODE`` allows a partial fit of ``MODEL.WEIGHTS``.

    Raises:
        ConfigError: the key is neither "strict" nor "initialise".
    """
    mode = cfg.MODEL.WEIGHTS_MODE
    if mode not in WEIGHTS_MODES:
        raise ConfigError(
            f"MODEL.WEIGHTS_MODE is '{mode}'; set it to {' or '.join(WEIGHTS_MODES)}."
        )
    return mode == "initialise"


def is_class_dependent(name: str) -> bool:
    """Whether a parameter has a row for each class."""
    return _CLASS_DEPENDENT.search(name) is not None


def select_start(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Select the parameters of a checkpoint that fit a model, and log the others.

    Args:
        found: parameters of the checkpoint, by this project's names.
        wanted: parameters of the model.
        source: the checkpoint's file, for the messages.

    Raises:
        CheckpointError: less than half of the backbone fits.
    """
    fitting = {
        name: value
        for name, value in found.items()
        if name in wanted
        and value.shape == wanted[name].shape
        and value.is_floating_point() == wanted[name].is_floating_point()
    }
    parts: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        parts[_part(name)].append(name)
    backbone = parts.get("backbone", [])
    if 2 * sum(name in fitting for name in backbone) < len(backbone) or not fitting:
        raise CheckpointError(
            f"Checkpoint '{source}' does not fit this model's backbone: only "
            f"{sum(name in fitting for name in backbone)} of its {len(backbone)} tensors have the "
            "name and shape of one in the checkpoint (MODEL.WEIGHTS_MODE 'initialise'). Use a "
            "config with a backbone of the same size."
        )
    for part, names in parts.items():
        logger.info(
            "Initialised from '%s': %d of the %d tensors of the %s",
            source,
            sum(name in fitting for name in names),
            len(names),
            part,
        )
    anew = [name for name in wanted if name not in fitting]
    sorts = (
        ("depend on the classes", [n for n in anew if n in found and is_class_dependent(n)]),
        ("depend on the number of queries", [n for n in anew if n in found and _QUERIES.search(n)]),
        ("are not in the checkpoint", [n for n in anew if n not in found]),
    )
    listed = {name for _, names in sorts for name in names}
    others = [name for name in anew if name not in listed]
    for reason, names in (*sorts, ("have another shape in the checkpoint", others)):
        if names:
            logger.info("%d tensors are not loaded: they %s: %s", len(names), reason, _join(names))
    unused = [name for name in found if name not in fitting and name not in wanted]
    if unused:
        logger.info("%d tensors of the checkpoint are not used: %s", len(unused), _join(unused))
    return fitting


def _part(name: str) -> str:
    if name.startswith("sem_seg_head.pixel_decoder."):
        return "pixel decoder"
    return "backbone" if name.startswith("backbone.") else "head"


def _join(names: list[str]) -> str:
    return ", ".join(names)
