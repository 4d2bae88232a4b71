"""Names of modules: patterns that choose them, and names that adapters may have."""

import re
from collections.abc import Iterable, Sequence

from torch import nn


def check_regex(argument: str, pattern: str) -> None:
    """Raise ValueError unless the pattern is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{argument} holds {pattern!r}; it must be a regular expression ({error})"
        ) from None


def check_modules_to_save(name_ends: Iterable[str], saved: Iterable[str]) -> None:
    """Raise ValueError unless each name end of `modules_to_save` belongs to a saved module."""
    for name_end in name_ends:
        if not any(name.endswith(name_end) for name in saved):
            raise ValueError(f"modules_to_save holds {name_end!r}, which matches no module")


def is_named(name: str, targets: str | Sequence[str]) -> bool:
    """Return whether the targets name this module, by PEFT's rules.

    A string is a regular expression for the whole name; a list holds last parts of names.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)


def check_adapter_name(name: str) -> None:
    """Raise an error unless nn.ModuleDict can hold an adapter of this name."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    if not name or "." in name or hasattr(nn.ModuleDict, name) or name == "training":
        raise ValueError(
            f"name is {name!r}; it must not be empty, have dots, or be an attribute of "
            "nn.ModuleDict"
        )
