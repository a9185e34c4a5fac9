"""What a user sees of a checkpoint that cannot be used."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken or of another model; the message lists what and why."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose file is missing, incomplete or not readable; another file may do."""


class MissingCheckpointError(DamagedCheckpointError):
    """A checkpoint whose file is not there."""


class UnwritableCheckpointError(CheckpointError):
    """A checkpoint that cannot be written, for instance because the disk is full."""
