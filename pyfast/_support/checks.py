"""Argument checks. Errors name the argument, its value and what it must be, before any kernel runs.

Checks raise; predicates, which begin with `is_`, return. `TypeError` is for a wrong type or dtype,
`ValueError` for the rest.
"""

import math
from collections.abc import Collection
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)

# --- predicates ---


def is_number(value: object) -> bool:
    """Return whether the value is a real number, Python's or NumPy's, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """Return whether the value is a number, neither NaN nor infinite."""
    # Comparisons, because torch.compile cannot trace math.isfinite of a symbolic number.
    return is_number(value) and -math.inf < value < math.inf


def is_probability(value: object) -> bool:
    """Return whether the value is a number in [0, 1), as dropout takes it."""
    return is_number(value) and 0 <= value < 1


# --- numbers and objects ---


def finite_number(name: str, value: object) -> None:
    """Raise unless the value is a finite number."""
    _no_tensor(name, value)
    if not is_finite_number(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number")


def probability(name: str, value: object) -> None:
    """Raise unless the value is a number in [0, 1)."""
    _no_tensor(name, value)
    if not is_probability(value):
        raise ValueError(
            f"{name} is {value!r}; it must be a number from 0 up to, but not including, 1"
        )


def _no_tensor(name: str, value: object) -> None:
    if isinstance(value, Tensor):  # whose values are too many for a message
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")


def size(name: str, value: object) -> None:
    """Raise unless the value is an integer, 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be an integer, 0 or more")


def seed(value: object) -> None:
    """Raise unless the value is an integer of 64 bits, signed or not, or an int64 tensor."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"seed is {value.dtype}; it must be torch.int64")
    elif not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"seed must be an int or an int64 tensor, not {type(value).__name__}")
    elif not -(2**63) <= value < 2**64:
        raise ValueError(f"seed is {value}; it must fit in 64 bits")


def instance(name: str, value: object, expected: type) -> None:
    """Raise unless the value is an instance of `expected`."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, not {type(value).__name__}")


def one_of(name: str, value: object, allowed: Collection) -> None:
    """Raise unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be {_join_with_or(allowed)}")


# --- tensors ---


def tensor(name: str, value: object, dtypes: Collection[torch.dtype] | None = None) -> None:
    """Raise unless the value is a tensor, of one of these dtypes if they are said."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} is {value.dtype}; it must be {_join_with_or(dtypes)}")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have one dtype."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} is {value.dtype} but {other_name} is {other.dtype}; they must be the same"
        )


def same_device(name: str, value: Tensor, other_name: str, device: torch.device) -> None:
    """Raise unless the tensor is on this device, which is that of `other_name`."""
    if value.device != device:
        raise ValueError(
            f"{name} is on {value.device} but {other_name} is on {device}; "
            "they must be on one device"
        )


def one_device(*tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one device."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the arguments are on {names}; they must be on one device")


def shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless the tensor has exactly this shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be {list(expected)}")


def last_dim(name: str, value: Tensor, size: int, reason: str) -> None:
    """Raise unless the last dimension has this size; the error gives the reason."""
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; its last dimension must be {size}, {reason}"
        )


def rows(x: Tensor, features: int) -> None:
    """Raise unless x, or the gradient dy, is floating with this many features a row."""
    if x.dtype not in FLOATS_AND_DOUBLE or x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"x or dy is {x.dtype} {list(x.shape)}; "
            f"it must be floating with a last dimension of {features}"
        )


def contiguous(name: str, value: Tensor) -> None:
    """Raise unless the tensor is contiguous."""
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {list(value.stride())}; it must be contiguous")


def examples(name: str, value: object, batch: int) -> None:
    """Raise unless the tensor lists examples of a cache that holds `batch`; any may repeat."""
    tensor(name, value, (torch.int64, torch.int32))
    if value.dim() != 1 or bool(((value < 0) | (value >= batch)).any()):
        raise ValueError(
            f"{name} is {value.tolist()}; "
            f"it must be a list of examples of the cache, which holds {batch}"
        )


def _join_with_or(values: Collection) -> str:
    texts = [str(value) if isinstance(value, torch.dtype) else repr(value) for value in values]
    *most, last = texts
    return f"{', '.join(most)} or {last}" if most else last
