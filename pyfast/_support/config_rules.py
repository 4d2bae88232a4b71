"""Rules for the fields of a configuration: a predicate, and its description for the error."""

from collections.abc import Callable, Mapping
from numbers import Integral

from pyfast._support import checks

Rule = tuple[Callable[[object], bool], str]


def check(config: object, rules: Mapping[str, Rule]) -> None:
    """Raise a ValueError that names the first field which breaks its rule."""
    for name, (holds, must_be) in rules.items():
        if not holds(getattr(config, name)):
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be {must_be}")


def plain(value: object) -> object:
    """Convert NumPy's numbers to Python's, inside mappings and lists, too."""
    if isinstance(value, Mapping):
        return {key: plain(number) for key, number in value.items()}
    if isinstance(value, list | tuple):
        return [plain(number) for number in value]
    return value if value is None else int(value) if isinstance(value, Integral) else float(value)


def is_count(value: object) -> bool:
    """Return whether the value is an integer above 0."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """Return whether the value is a number that float32 holds, with some room."""
    return checks.is_number(value) and abs(value) < 1e38


def is_names(value: object) -> bool:
    """Return whether the value is a list, a tuple or a set of strings, none empty."""
    return isinstance(value, list | tuple | set) and all(
        isinstance(name, str) and name for name in value
    )


def is_regex_or_names(value: object) -> bool:
    """Return whether the value is a string or names, and not empty."""
    return (isinstance(value, str) or is_names(value)) and len(value) > 0


FLAG = (lambda v: isinstance(v, bool), "True or False")
DROPOUT = (checks.is_probability, "a number from 0 up to, but not including, 1")
NAMES = (is_names, "a list of names")
DTYPE = (lambda v: v is None or v in checks.FLOATS_AND_DOUBLE, "a floating dtype or None")
