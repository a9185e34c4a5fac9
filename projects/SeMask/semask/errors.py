"""Errors in a config, a dataset or a checkpoint that a user can correct."""


class UserError(ValueError):
    """An error that a user can correct; the message is one sentence and needs no traceback."""


class ConfigError(UserError):
    """A config file, key or override that cannot be used; the message says where and why."""


class DataError(UserError):
    """A file of a dataset that cannot be used; the message names it and says what to do.

    Attributes:
        advice: the part of the message that is the same for many files, or "".
    """

    def __init__(self, message: str, advice: str = "") -> None:
        """
        Args:
            message: what is wrong with the file.
            advice: see the class.
        """
        super().__init__(f"{message} {advice}" if advice else message)
        self.advice = advice


class UnreadableError(DataError):
    """A file that is missing or damaged, in a dataset that may be sound otherwise."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model; the message says why."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint file that is missing, incomplete or unreadable; an earlier one may work."""


class MissingCheckpointError(DamagedCheckpointError):
    """A checkpoint whose file does not exist."""


class UnwritableCheckpointError(CheckpointError):
    """A checkpoint that cannot be written, for instance because the disk is full."""


class OutOfMemoryError(RuntimeError):
    """A device or the machine has too little memory; the message names settings to change."""
