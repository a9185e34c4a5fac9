"""Differences between a checkpoint and a model, and the most likely fix."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semask.checkpoint.convert import CheckpointKind
from semask.checkpoint.mask_models import MASK_DECODERS, find_config, find_decoder
from semask.checkpoint.start import is_class_dependent

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
        take = f" Its config is configs/{config}." if config else ""
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
            take = f", such as configs/{config}" if config else ""
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
    more = f", ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
