"""The error of a file that can not be read."""


class CheckpointError(ValueError):
    """A file that is not what it must be; the message names the entry."""
