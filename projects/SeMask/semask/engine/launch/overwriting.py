"""Protects the checkpoints of an earlier run from being overwritten."""

import logging
import os

from semask.checkpoint import written_checkpoints
from semask.errors import ConfigError

logger = logging.getLogger(__name__)


def refuse_overwriting(folder: str) -> None:
    """Refuse to start a run in a folder with checkpoints of an earlier run.

    Args:
        folder: OUTPUT_DIR; need not exist.

    Raises:
        ConfigError: there are some.
    """
    names = written_checkpoints(folder)
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' has the checkpoints of an earlier run ({', '.join(names[:4])}"
            f"{more}). Add --resume to go on from the last one, give another OUTPUT_DIR, or add "
            "--overwrite to remove them and begin anew (in Python, arguments of resume_or_load)."
        )


def remove_checkpoints(folder: str) -> None:
    """Remove the checkpoints of an earlier run, so that they are not taken for this run's.

    Args:
        folder: OUTPUT_DIR; the other files in it stay.
    """
    names = written_checkpoints(folder)
    for name in names:
        os.unlink(os.path.join(folder, name))
    if names:
        logger.info("Removed from '%s', as told: %s", folder, ", ".join(names))
