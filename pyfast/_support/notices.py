"""Warnings that are given once a process."""

import warnings

_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn that a path is slow or missing, the first time this message is given."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"pyfast: {message}", stacklevel=3)
