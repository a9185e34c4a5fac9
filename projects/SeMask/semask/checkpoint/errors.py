"""What a user sees of a checkpoint that cannot be used."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken or of another model; the message lists what and why."""
