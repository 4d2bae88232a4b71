"""Names of modules: patterns that choose them, and names that adapters may have."""

import re
from collections.abc import Iterable

from torch import nn


def check_regex(name: str, pattern: str) -> None:
    """A pattern that compiles."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name} holds {pattern!r}; it must be a regular expression ({error})"
        ) from None


def check_saved(ends: Iterable[str], saved: Iterable[str]) -> None:
    """No module to save that is nowhere."""
    for end in ends:
        if not any(name.endswith(end) for name in saved):
            raise ValueError(f"modules_to_save holds {end!r}, which matches no module")


def is_named(name: str, wanted: object) -> bool:
    """Whether a module's name is meant, by PEFT's rules: a regex for all of it, or a list of its last parts."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return name in wanted or any(name.endswith(f".{end}") for end in wanted)


def check_name(name: str) -> None:
    """A name that nn.ModuleDict can hold."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    if not name or "." in name or hasattr(nn.ModuleDict, name) or name == "training":
        raise ValueError(
            f"name is {name!r}; it must not be empty, have dots, or be an attribute of nn.ModuleDict"
        )
