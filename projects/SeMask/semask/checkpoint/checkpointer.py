"""Checkpoints are loaded completely or not at all, run no code, and are never half-written."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from semask.checkpoint.convert import (
    CheckpointKind,
    below_pyramid,
    convert_state_dict,
    resize_bias_tables,
)
from semask.checkpoint.reading import read_checkpoint
from semask.checkpoint.swin_names import has_former_names
from semask.checkpoint.writing import write_checkpoint, written_durably
from semask.errors import CheckpointError, DamagedCheckpointError
from semask.utils.text import one_line

logger = logging.getLogger(__name__)

# What may be missing from a checkpoint, and what may be left over (regular expressions).
# Detectron2 starts a model without them; everything else has to fit exactly.
# Older releases of PyTorch did not count BatchNorm's batches, and nothing here uses the number.
_COUNTERS = r"\.num_batches_tracked$"
# The pre-trained classifier has neither semantic layers nor output norms nor heads.
_BESIDES_SWIN = (
    r"\.semantic_layers\.|\.output_norms\.|^(?!backbone\.)|^backbone\.(fpn_\w+|top_block)\."
)
_MAY_MISS = {
    CheckpointKind.IMAGENET_SWIN: _BESIDES_SWIN,
    CheckpointKind.CONVERTED_SWIN: _BESIDES_SWIN,
}
_MAY_BE_LEFT = {CheckpointKind.IMAGENET_SWIN: r"^(head|norm)\."}

_LISTED = 8


@dataclass
class Mismatch:
    """Where a checkpoint and a model differ.

    Attributes:
        missing: names of the model that the checkpoint does not have.
        left_over: names of the checkpoint that the model does not have.
        shapes: names with the shape in the checkpoint and in the model.
        types: names whose values are no fractions, with the type in the checkpoint.
    """

    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    types: list[tuple[str, torch.dtype]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.left_over or self.shapes or self.types)

    def describe(self) -> str:
        """The differences, a few of each sort, with their counts."""
        shapes = [f"{name} {old} -> {new}" for name, old, new in self.shapes]
        types = [f"{name} ({dtype})" for name, dtype in self.types]
        parts = (
            ("missing from the checkpoint", self.missing),
            ("left over in the checkpoint", self.left_over),
            ("of another shape (checkpoint -> model)", shapes),
            ("without fractions, where the model has floating-point numbers", types),
        )
        return "".join(f" {len(names)} {what}: {_listed(names)}." for what, names in parts if names)

    def hint(self) -> str:
        """What the user most probably has to change, or ""."""
        for name, old, new in self.shapes:
            if name.endswith((".predictor.weight", ".predictor.bias")) and old[1:] == new[1:]:
                return (
                    f" The checkpoint has {old[0]} classes and the model {new[0]}: take the "
                    "config.yaml that its run has left in its OUTPUT_DIR, or set "
                    f"MODEL.SEM_SEG_HEAD.NUM_CLASSES to {old[0]} (for an own dataset, name the "
                    f"{old[0]} classes in DATASETS.FOLDER_CLASSES), or start from weights without "
                    "a head."
                )
        semantic = [".semantic_layers." in name for name in self.missing + self.left_over]
        if any(semantic) and all(semantic) and not self.shapes:
            without = "checkpoint" if self.missing else "model"
            return (
                f" The {without} lacks the semantic layers: see MODEL.SEMASK.ATTENTION and "
                "MODEL.SEMASK.NUM_BLOCKS."
            )
        return " Is it the checkpoint of this config?"


class SeMaskCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, strict and safe.

    It loads this project's checkpoints, published ones and ImageNet Swin (see
    :mod:`semask.checkpoint.convert`), from ``.pth`` files that hold tensors and plain values only,
    ``.pkl`` files that hold NumPy arrays only, or ``.safetensors``. It saves atomically: whatever
    interrupts a save, the file before it and ``last_checkpoint`` stay as they were.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        allow_pickle: bool = False,
        complete: bool = False,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the model, possibly wrapped for distributed training.
            save_dir: local folder of the checkpoints.
            save_to_disk: whether this process writes; None = only the main process does.
            allow_pickle: also load ``.pkl`` files that hold more than NumPy arrays. Such a file can
                run any code when it is read: only for files whose author you trust.
            complete: also refuse what is a good start for a training only, as a pre-trained
                backbone is: the model is to predict.
            checkpointables: objects with ``state_dict`` and ``load_state_dict``, by name.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.allow_pickle = allow_pickle
        self.complete = complete

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load the model, and the checkpointables that the file has.

        Args:
            path: file or URL; "" loads nothing.
            checkpointables: names to load; None = all.

        Returns:
            What else the checkpoint holds.

        Raises:
            CheckpointError: the file is missing, broken, unsafe or of another model. The model
                is then as it was.
        """
        if not path:
            logger.info("No checkpoint is given: the model keeps its initial weights.")
            return {}
        logger.info("Loading checkpoint '%s'", path)
        checkpoint = self._load_file(path)
        names = list(self.checkpointables) if checkpointables is None else checkpointables
        if has_former_names(checkpoint["model"]) and any(name in checkpoint for name in names):
            raise CheckpointError(
                f"Checkpoint '{path}' is of a run that an earlier version of this project began: "
                "its weights can be used, but its training state (optimizer, averaged weights) "
                "has another order. Go on with that version, or give the file as MODEL.WEIGHTS to "
                "a run without --resume, in another OUTPUT_DIR."
            )
        state_dict = self._fitting_state_dict(path, checkpoint.pop("model"))
        for name in names:
            if name not in checkpoint:
                logger.warning("Checkpoint '%s' has no state '%s', which starts anew", path, name)
                continue
            try:
                self.checkpointables[name].load_state_dict(checkpoint.pop(name))
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                raise CheckpointError(
                    f"Checkpoint '{path}' does not fit this run: its '{name}' state is of "
                    f"another model or optimizer ({one_line(error)}). Start without --resume "
                    "in another OUTPUT_DIR, or use the config it was made with."
                ) from error
        self.model.load_state_dict(state_dict, strict=False)  # what is missing is allowed to be
        return checkpoint

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """With ``resume``, load everything from the last checkpoint of the folder, if it has one.

        Where that one is damaged or missing, it is the checkpoint written before it.

        Args:
            path: file or URL whose weights are loaded otherwise.
            resume: as above.

        Returns:
            As ``load``.

        Raises:
            CheckpointError: no checkpoint can be used.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        newest = self.get_checkpoint_file()
        try:
            return self.load(newest)
        except DamagedCheckpointError as error:
            damaged = error
        for former in self._files_before(newest):
            logger.warning("%s Trying the one before, '%s'.", damaged, former)
            try:
                return self.load(former)
            except DamagedCheckpointError as error:
                damaged = error
        raise damaged

    def _files_before(self, newest: str) -> list[str]:
        """The periodic checkpoints in the folder that are no newer than ``newest``, newest first.

        Files that an earlier run left in the folder are older than those of the last one.
        """
        files = [
            entry
            for entry in os.scandir(self.save_dir)
            if re.fullmatch(r"model_(\d+|final)\.pth", entry.name)
            and entry.name != os.path.basename(newest)
        ]
        files.sort(key=lambda entry: (entry.stat().st_mtime_ns, entry.name), reverse=True)
        written = os.stat(newest).st_mtime_ns if os.path.isfile(newest) else None
        return [
            os.path.join(self.save_dir, entry.name)
            for entry in files
            if written is None or entry.stat().st_mtime_ns <= written
        ]

    def check(self, path: str) -> None:
        """Raise what ``load`` would raise about the model, and change nothing.

        The model may be on the meta device. "" is no checkpoint and never refused.
        """
        if path:
            self._fitting_state_dict(path, self._load_file(path)["model"])

    def check_weights(self, weights: Mapping[str, Tensor], source: str = "given") -> None:
        """As ``check``, for parameters by name; ``source`` is what the message calls them."""
        self._fitting_state_dict(source, dict(weights))

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name + ".pth"`` into the folder, then point ``last_checkpoint`` to it.

        Args:
            name: file name without extension.
            kwargs: further values to save; tensors and plain types only, or they could not be
                loaded again.

        Raises:
            CheckpointError: it cannot be written; what was there before is untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data: dict[str, Any] = {"model": self.model.state_dict()}
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        data |= kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_checkpoint(path, data)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make ``last_checkpoint`` name a file, atomically.

        Raises:
            CheckpointError: it cannot be written; it names the former file then.
        """
        with written_durably(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def _fitting_state_dict(self, path: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's parameters by the model's names, if they fit the model."""
        wanted = self.model.state_dict()
        try:
            found, kind = convert_state_dict(state_dict)
        except CheckpointError as error:
            if not wanted.keys() & state_dict.keys():
                raise CheckpointError(f"Checkpoint '{path}': {error}") from error
            found, kind = state_dict, CheckpointKind.NATIVE  # of a model with another backbone
        # The others are complete models.
        if kind in (CheckpointKind.IMAGENET_SWIN, CheckpointKind.CONVERTED_SWIN):
            found = below_pyramid(found, wanted)
            found = resize_bias_tables(found, wanted)
        mismatch = _compare(found, wanted, kind)
        if mismatch:
            raise CheckpointError(
                f"Checkpoint '{path}' ({kind.value}) does not fit the model."
                f"{mismatch.describe()}{mismatch.hint()}"
            )
        missing = [k for k in wanted if k not in found and not re.search(_COUNTERS, k)]
        if self.complete and missing:
            raise CheckpointError(
                f"Checkpoint '{path}' ({kind.value}) is no complete model: it has no values for "
                f"{len(missing)} of its {len(wanted)} tensors, {missing[0]} among them. It can "
                "start a training, but predict nothing: give MODEL.WEIGHTS a checkpoint that a "
                "training of this model has written."
            )
        return {name: value for name, value in found.items() if name in wanted}

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename, allow_pickle=self.allow_pickle)


def _compare(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], kind: CheckpointKind
) -> Mismatch:
    """The differences that the kind of checkpoint does not explain."""
    may_miss = _MAY_MISS.get(kind, _COUNTERS)
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
    )


def _listed(names: list[str]) -> str:
    more = f", ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
