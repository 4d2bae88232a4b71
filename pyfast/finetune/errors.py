"""The error of a job that cannot run."""


class JobError(ValueError):
    """An error that the user can correct; its message names the cause and what is expected."""
