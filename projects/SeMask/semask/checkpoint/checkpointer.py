"""Checkpoints are loaded completely or not at all, run no code, and are never half-written."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from semask.checkpoint.convert import (
    CheckpointKind,
    UnknownNamesError,
    adapt_channels,
    below_pyramid,
    convert_state_dict,
    resize_bias_tables,
)
from semask.checkpoint.encoder_names import encoder_weights
from semask.checkpoint.folder import LAST, has_checkpoint, read_last, resumable_checkpoints
from semask.checkpoint.mismatch import COUNTERS, compare
from semask.checkpoint.reading import read_checkpoint
from semask.checkpoint.start import select_start
from semask.checkpoint.swin_names import has_former_names
from semask.checkpoint.writing import write_checkpoint, written_durably
from semask.errors import CheckpointError, DamagedCheckpointError
from semask.utils.text import one_line

logger = logging.getLogger(__name__)


class SeMaskCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, strict and safe.

    It loads this project's checkpoints, published ones and ImageNet Swin (see
    :mod:`semask.checkpoint.convert`), from ``.pth`` files that hold tensors and plain values only,
    ``.pkl`` files that hold NumPy arrays only, or ``.safetensors``. It saves atomically: after
    an interrupted save, the earlier file and ``last_checkpoint`` are unchanged.

    Attributes:
        loaded: the file of the model's weights; "" = none was loaded.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        allow_pickle: bool = False,
        complete: bool = False,
        partial: bool = False,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the model, possibly wrapped for distributed training.
            save_dir: local folder of the checkpoints.
            save_to_disk: whether this process writes; None = only the main process does.
            allow_pickle: also load ``.pkl`` files that hold more than NumPy arrays. Such a file can
                run any code when it is read: only for files whose author you trust.
            complete: also refuse weights that can only start a training, such as a pre-trained
                backbone; for prediction.
            partial: load the weights that fit the model and initialise the rest, unless
                ``complete`` is set. Resuming a run is always strict.
            checkpointables: objects with ``state_dict`` and ``load_state_dict``, by name.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.allow_pickle = allow_pickle
        self.complete = complete
        self.partial = partial and not complete
        self.loaded = ""

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, strict: bool = False
    ) -> dict[str, Any]:
        """Load the model, and the checkpointables that the file has.

        Args:
            path: file or URL; "" loads nothing.
            checkpointables: names to load; None = all.
            strict: refuse a partial fit, also where the checkpointer is ``partial``.

        Returns:
            The remaining entries of the checkpoint.

        Raises:
            CheckpointError: the file is missing, broken, unsafe or of another model. The model
                is then unchanged.
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
        state_dict = self._fitting_state_dict(
            path, checkpoint.pop("model"), self.partial and not strict
        )
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
        self.model.load_state_dict(state_dict, strict=False)  # checked above
        self.loaded = path
        # For a model alone, as in a predictor, a training's states are left out without a warning.
        resumes = checkpointables is None and bool(self.checkpointables)
        for name, value in checkpoint.items():
            if resumes and isinstance(value, Mapping):
                logger.warning("The state '%s' in '%s' is not used by this run", name, path)
        return checkpoint

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """With ``resume``, load everything from the last checkpoint of the folder, if it has one.

        If that one is damaged or missing, the checkpoint before it is loaded.

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
            return self.load(newest, strict=True)
        except DamagedCheckpointError as error:
            damaged = error
        for name in resumable_checkpoints(self.save_dir, before=os.path.basename(newest)):
            former = os.path.join(self.save_dir, name)
            logger.warning("%s Trying the one before, '%s'.", damaged, former)
            try:
                return self.load(former, strict=True)
            except DamagedCheckpointError as error:
                damaged = error
        raise damaged

    def has_checkpoint(self) -> bool:
        """Whether the folder has a checkpoint to go on from."""
        return bool(self.save_dir) and has_checkpoint(self.save_dir)

    def get_checkpoint_file(self) -> str:
        """The last checkpoint of the folder.

        If ``last_checkpoint`` is missing or damaged, the one of the highest iteration.

        Raises:
            DamagedCheckpointError: there is no such file either.
        """
        try:
            name = read_last(self.save_dir)
        except DamagedCheckpointError as error:
            names = resumable_checkpoints(self.save_dir)
            if not names:
                raise
            name = names[0]
            logger.warning("%s The latest checkpoint there is '%s'.", error, name)
        return os.path.join(self.save_dir, name)

    def check(self, path: str, *, strict: bool = False) -> None:
        """Raise the errors that ``load`` would raise, and change nothing.

        The model may be on the meta device. "" is no checkpoint and never refused.
        """
        if path:
            self._fitting_state_dict(
                path, self._load_file(path)["model"], self.partial and not strict
            )

    def check_weights(self, weights: Mapping[str, Tensor], source: str = "given") -> None:
        """As ``check``, for parameters by name; ``source`` names them in messages."""
        self._fitting_state_dict(source, dict(weights))

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name + ".pth"`` into the folder, then point ``last_checkpoint`` to it.

        Args:
            name: file name without extension.
            kwargs: further values to save; tensors and plain types only, or they could not be
                loaded again.

        Raises:
            CheckpointError: it cannot be written; earlier files are unchanged.
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
        with written_durably(os.path.join(self.save_dir, LAST)) as file:
            file.write(last_filename_basename.encode())

    def _fitting_state_dict(
        self, path: str, state_dict: dict[str, Tensor], partial: bool = False
    ) -> dict[str, Tensor]:
        """The checkpoint's parameters by the model's names, if they fit the model.

        With ``partial``, only those that fit.
        """
        wanted = self.model.state_dict()
        encoder = encoder_weights(state_dict, self.model)
        try:
            if encoder is None:
                found, kind = convert_state_dict(state_dict)
            else:
                found, kind = encoder, CheckpointKind.ENCODER
        except CheckpointError as error:
            unknown = isinstance(error, UnknownNamesError)
            if not (unknown and wanted.keys() & state_dict.keys()):
                raise CheckpointError(f"Checkpoint '{path}': {error}") from error
            found, kind = state_dict, CheckpointKind.NATIVE  # of a model with another backbone
        # The others are complete models.
        backbone_alone = kind in (CheckpointKind.IMAGENET_SWIN, CheckpointKind.CONVERTED_SWIN)
        if backbone_alone or partial:
            found = below_pyramid(found, wanted)
            found = resize_bias_tables(found, wanted)
        if backbone_alone or partial or kind is CheckpointKind.ENCODER:
            found = adapt_channels(found, wanted)
        if partial:
            return select_start(found, wanted, path)
        mismatch = compare(found, wanted, kind)
        if mismatch:
            raise CheckpointError(
                f"Checkpoint '{path}' ({kind.value}) does not fit the model."
                f"{mismatch.describe()}{mismatch.hint()}"
            )
        missing = [k for k in wanted if k not in found and not re.search(COUNTERS, k)]
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
