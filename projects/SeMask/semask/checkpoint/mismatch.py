"""Differences between a checkpoint and a model, and the most likely fix.

Partial loading initialises a model with other classes, layers or another decoder.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import Tensor

from semask.checkpoint.convert import CheckpointKind
from semask.checkpoint.mask_models import MASK_DECODERS, find_config, find_decoder
from semask.errors import CheckpointError, ConfigError
from semask.utils.text import first_of

logger = logging.getLogger(__name__)

# Names that may be missing from a checkpoint or unused by the model (regular expressions).
# Detectron2 can load a model without them; everything else must match exactly. Older PyTorch had no
# num_batches_tracked in BatchNorm, and nothing here uses it.
COUNTERS = r"\.num_batches_tracked$"
# The pre-trained classifier has no semantic layers, output norms or heads.
_BESIDES_SWIN = (
    r"\.semantic_layers\.|\.output_norms\.|^(?!backbone\.)|^backbone\.(fpn_\w+|top_block)\."
)
_MAY_MISS = {
    CheckpointKind.IMAGENET_SWIN: _BESIDES_SWIN,
    CheckpointKind.CONVERTED_SWIN: _BESIDES_SWIN,
    CheckpointKind.ENCODER: _BESIDES_SWIN,
}
_MAY_BE_LEFT = {CheckpointKind.IMAGENET_SWIN: r"^(head|norm)\."}

# Number of names of each group that a message lists.
_LISTED = 8

WEIGHTS_MODES = ("strict", "initialise")

# Parameters with a row for each class, or for each query.
_CLASS_DEPENDENT = re.compile(
    r"\.semantic_layers\.\w+\.(blocks\.\d+\.)?(query|key)\."
    r"|\.predictor\.class_embed\."
    r"|^sem_seg_head\.(semantic_fpn\.)?predictor\.(weight|bias)$"
    r"|\.box_predictor\.|\.mask_head\.predictor\.|^head\.cls_score\."
)
_QUERIES = re.compile(r"\.predictor\.(query_feat|query_embed)\.")


@dataclass
class Mismatch:
    """The differences between a checkpoint and a model.

    Attributes:
        missing: names in the model that the checkpoint lacks.
        left_over: names in the checkpoint that the model lacks.
        shapes: names whose shapes differ, with the shape in the checkpoint and in the model.
        types: names of parameters that are not floating-point, with the checkpoint's dtype.
        found: all parameters of the checkpoint.
        wanted: all parameters of the model.
    """

    missing: list[str]
    left_over: list[str]
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    types: list[tuple[str, torch.dtype]]
    found: Mapping[str, Tensor]
    wanted: Mapping[str, Tensor]

    def __bool__(self) -> bool:
        return bool(self.missing or self.left_over or self.shapes or self.types)

    def describe(self) -> str:
        """The differences, a few of each group, with their counts."""
        shapes = [f"{name} {old} -> {new}" for name, old, new in self.shapes]
        types = [f"{name} ({dtype})" for name, dtype in self.types]
        parts = (
            ("missing from the checkpoint", self.missing),
            ("not in the model", self.left_over),
            ("with another shape (checkpoint -> model)", shapes),
            ("not floating-point, unlike the model's", types),
        )
        return "".join(f" {len(names)} {what}: {shorten(names)}." for what, names in parts if names)

    def hint(self) -> str:
        """The most likely fix, or ""."""
        return self._other_decoder() or self._other_classes() or self._semantic_layers()

    def _other_decoder(self) -> str:
        decoder, wanted = find_decoder(self.found), find_decoder(self.wanted)
        if None in (decoder, wanted) or decoder == wanted:
            return ""
        config = find_config(self.found)
        take = f" Its config is {config}." if config else ""
        return (
            f" The checkpoint's decoder is '{decoder}', and the model's '{wanted}' "
            f"(MODEL.SEM_SEG_HEAD.NAME, MODEL.MASK_FORMER.DECODER).{take}"
        )

    def _other_classes(self) -> str:
        for name, old, new in self.shapes:
            if not is_class_dependent(name) or old[1:] != new[1:]:
                continue
            extra = 1 if ".class_embed." in name else 0  # "no object"
            classes = old[0] - extra
            return (
                f" The checkpoint has {classes} classes and the model {new[0] - extra}: use the "
                "config.yaml in the OUTPUT_DIR of its run, or set "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES to {classes} (for your own dataset, name the "
                f"{classes} classes in DATASETS.FOLDER_CLASSES), or set MODEL.WEIGHTS_MODE to "
                "'initialise' to train the class-dependent parameters from scratch."
            )
        return ""

    def _semantic_layers(self) -> str:
        semantic = [".semantic_layers." in name for name in self.missing + self.left_over]
        if not (any(semantic) and all(semantic)) or self.shapes:
            return " Check that it is a checkpoint of this config."
        if self.missing and find_decoder(self.found) in MASK_DECODERS:
            config = find_config(self.found)
            take = f", such as {config}" if config else ""
            return (
                " The checkpoint lacks the semantic layers. Their normalisation is in the residual "
                "stream and changes all features, even with a gamma of 0, so the checkpoint can "
                "only initialise a SeMask model. Set MODEL.WEIGHTS_MODE to 'initialise' for a "
                f"training from it, or use a config without semantic layers{take}."
            )
        without = "checkpoint" if self.missing else "model"
        return (
            f" The {without} lacks the semantic layers: see MODEL.SEMASK.ATTENTION and "
            "MODEL.SEMASK.NUM_BLOCKS."
        )


def compare(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], kind: CheckpointKind
) -> Mismatch:
    """The differences between a checkpoint and a model that are not expected for its kind.

    Args:
        found: parameters of the checkpoint, by this project's names.
        wanted: parameters of the model.
        kind: of the checkpoint.
    """
    may_miss = _MAY_MISS.get(kind, COUNTERS)
    may_be_left = _MAY_BE_LEFT.get(kind, r"(?!)")
    return Mismatch(
        missing=[k for k in wanted if k not in found and not re.search(may_miss, k)],
        left_over=[k for k in found if k not in wanted and not re.search(may_be_left, k)],
        shapes=[
            (k, tuple(v.shape), tuple(wanted[k].shape))
            for k, v in found.items()
            if k in wanted and v.shape != wanted[k].shape
        ],
        types=[
            (k, v.dtype)
            for k, v in found.items()
            if k in wanted and wanted[k].is_floating_point() and not v.is_floating_point()
        ],
        found=found,
        wanted=wanted,
    )


def shorten(names: Sequence[str]) -> str:
    """A few names, and the number of the others."""
    return first_of(names, _LISTED)


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
    initialised = [name for name in wanted if name not in fitting]
    sorts = (
        ("depend on the classes", [n for n in initialised if n in found and is_class_dependent(n)]),
        (
            "depend on the number of queries",
            [n for n in initialised if n in found and _QUERIES.search(n)],
        ),
        ("are not in the checkpoint", [n for n in initialised if n not in found]),
    )
    listed = {name for _, names in sorts for name in names}
    others = [name for name in initialised if name not in listed]
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
