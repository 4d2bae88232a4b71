"""Rules for the fields of a configuration: what holds, and how it is said."""

from collections.abc import Callable, Mapping
from numbers import Integral, Real

from pyfast._support import checks

Rule = tuple[Callable[[object], bool], str]


def check(config: object, rules: Mapping[str, Rule]) -> None:
    """The first field that breaks its rule is named."""
    for name, (holds, must_be) in rules.items():
        if not holds(getattr(config, name)):
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be {must_be}")


def plain(value: object) -> object:
    """Python's numbers for NumPy's."""
    if isinstance(value, Mapping):
        return {key: plain(number) for key, number in value.items()}
    if isinstance(value, list | tuple):
        return [plain(number) for number in value]
    return value if value is None else int(value) if isinstance(value, Integral) else float(value)


def is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e38


def is_names(value: object) -> bool:
    return isinstance(value, list | tuple | set) and all(
        isinstance(name, str) and name for name in value
    )


def is_regex_or_names(value: object) -> bool:
    """One that means something."""
    return (isinstance(value, str) or is_names(value)) and len(value) > 0


FLAG = (lambda v: isinstance(v, bool), "True or False")
DROPOUT = (lambda v: is_number(v) and 0 <= v < 1, "a number from 0 up to, but not including, 1")
NAMES = (is_names, "a list of names")
DTYPE = (lambda v: v is None or v in checks.FLOATS_AND_DOUBLE, "a floating dtype or None")
