"""Notices that are given once a process."""

import warnings

_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Slow or missing paths say so, once a process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"pyfast: {message}", stacklevel=3)
