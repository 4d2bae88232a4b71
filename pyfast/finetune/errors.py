"""The error of a job that can not run."""


class JobError(ValueError):
    """What its user can put right; the message says where it is and what it must be."""
