"""A checkpointer with strict loading, without unsafe pickles, and with atomic saving."""

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
from semask.checkpoint.folder import (
    LAST,
    has_checkpoint,
    read_last,
    resumable_checkpoints,
    write_checkpoint,
    written_durably,
)
from semask.checkpoint.mismatch import COUNTERS, compare, select_start
from semask.checkpoint.reading import read_checkpoint
from semask.checkpoint.swin_names import has_former_names
from semask.errors import CheckpointError, DamagedCheckpointError
from semask.utils.text import one_line

logger = logging.getLogger(__name__)


class SeMaskCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, strict and safe.

    It loads this project's checkpoints, published ones and ImageNet Swin (see
    :mod:`semask.checkpoint.convert`), from ``.pth`` files that hold tensors and plain values only,
    ``.pkl`` files that hold NumPy arrays only, or ``.safetensors``. It saves atomically: after an
    interrupted save, the previous file and ``last_checkpoint`` are unchanged.

    Attributes:
        loaded: the file from which the weights were loaded; "" = none.
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
            allow_pickle: also load ``.pkl`` files that hold more than NumPy arrays. Reading such a
                file can run arbitrary code: use it only for files whose author you trust.
            complete: for prediction; also refuse weights that only initialise a training, such as a
                pre-trained backbone.
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
        """Load the model and the checkpointables in the file.

        Args:
            path: file or URL; "" loads nothing.
            checkpointables: names to load; None = all.
            strict: refuse a partial fit even if the checkpointer is ``partial``.

        Returns:
            The remaining entries of the checkpoint.

        Raises:
            CheckpointError: the file is missing, damaged, unsafe or of another model. The model is
                then unchanged.
        """
        if not path:
            logger.info("No checkpoint given: the model keeps its initial weights.")
            return {}
        logger.info("Loading checkpoint '%s'", path)
        checkpoint = self._load_file(path)
        names = list(self.checkpointables) if checkpointables is None else checkpointables
        if has_former_names(checkpoint["model"]) and any(name in checkpoint for name in names):
            raise CheckpointError(
                f"Checkpoint '{path}' was written by an earlier version of this project: its "
                "weights can be loaded, but its training state (optimizer, averaged weights) has "
                "another order. Resume with that version, or set MODEL.WEIGHTS to the file in a "
                "run without --resume and with another OUTPUT_DIR."
            )
        state_dict = self._fitting_state_dict(
            path, checkpoint.pop("model"), self.partial and not strict
        )
        for name in names:
            if name not in checkpoint:
                logger.warning("Checkpoint '%s' has no state '%s': it is initialised", path, name)
                continue
            try:
                self.checkpointables[name].load_state_dict(checkpoint.pop(name))
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                raise CheckpointError(
                    f"Checkpoint '{path}' does not fit this run: its '{name}' state is of "
                    f"another model or optimizer ({one_line(error)}). Start without --resume "
                    "in another OUTPUT_DIR, or use the config of the run that wrote it."
                ) from error
        self.model.load_state_dict(state_dict, strict=False)  # checked above
        self.loaded = path
        # Without checkpointables, as in a predictor, training states are skipped without a warning.
        resumes = checkpointables is None and bool(self.checkpointables)
        for name, value in checkpoint.items():
            if resumes and isinstance(value, Mapping):
                logger.warning("The state '%s' in '%s' is not used by this run", name, path)
        return checkpoint

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """With ``resume``, load everything from the last checkpoint of the folder, if it has one.

        Args:
            path: file or URL whose weights are loaded otherwise.
            resume: whether to resume. If the last checkpoint is damaged or missing, the one
                before it is loaded.

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
            logger.warning("%s Trying the previous one, '%s'.", damaged, former)
            try:
                return self.load(former, strict=True)
            except DamagedCheckpointError as error:
                damaged = error
        raise damaged

    def has_checkpoint(self) -> bool:
        """Whether the folder has a checkpoint to resume from."""
        return bool(self.save_dir) and has_checkpoint(self.save_dir)

    def get_checkpoint_file(self) -> str:
        """The last checkpoint of the folder.

        If ``last_checkpoint`` is missing or damaged, the one of the highest iteration.

        Raises:
            DamagedCheckpointError: there is no such checkpoint.
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
        """Raise the errors that ``load`` would raise, without changing anything.

        The model may be on the meta device. An empty path is accepted.
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
            kwargs: further values to save; only tensors and plain types can be loaded again.

        Raises:
            CheckpointError: the file cannot be written; earlier files are unchanged.
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
        """Write a file name into ``last_checkpoint``, atomically.

        Raises:
            CheckpointError: the file cannot be written and is unchanged.
        """
        with written_durably(os.path.join(self.save_dir, LAST)) as file:
            file.write(last_filename_basename.encode())

    def _fitting_state_dict(
        self, path: str, state_dict: dict[str, Tensor], partial: bool = False
    ) -> dict[str, Tensor]:
        """The checkpoint's parameters under the model's names, checked to fit the model.

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
            found, kind = state_dict, CheckpointKind.NATIVE  # for a model with another backbone
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
                f"Checkpoint '{path}' ({kind.value}) is not a complete model: it lacks "
                f"{len(missing)} of its {len(wanted)} tensors, such as {missing[0]}. It can "
                "initialise a training but cannot predict: set MODEL.WEIGHTS to a checkpoint "
                "written by a training of this model."
            )
        return {name: value for name, value in found.items() if name in wanted}

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename, allow_pickle=self.allow_pickle)
