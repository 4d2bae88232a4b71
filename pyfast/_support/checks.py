"""Argument checks: each names the argument, what it was and what it must be, before any kernel runs."""

from collections.abc import Collection

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)


def tensor(name: str, value: object, dtypes: Collection[torch.dtype] | None = None) -> None:
    """A tensor, of one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} is {value.dtype}; it must be {_any_of(dtypes)}")


def instance(name: str, value: object, kind: type) -> None:
    """An object of this class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")


def size(name: str, value: object) -> None:
    """A count, not negative."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be an integer, 0 or more")


def seed(value: object) -> None:
    """An integer of 64 bits, signed or not, or one in a tensor."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"seed is {value.dtype}; it must be torch.int64")
    elif not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"seed must be an int or an int64 tensor, not {type(value).__name__}")
    elif not -(2**63) <= value < 2**64:
        raise ValueError(f"seed is {value}; it must fit in 64 bits")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors of one dtype."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} is {value.dtype} but {other_name} is {other.dtype}; they must be the same"
        )


def same_device(name: str, value: Tensor, other_name: str, device: torch.device) -> None:
    """A tensor that lives where another does."""
    if value.device != device:
        raise ValueError(
            f"{name} is on {value.device} but {other_name} is on {device}; they must be on one device"
        )


def one_device(*tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one device."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the arguments are on {names}; they must be on one device")


def rows(x: Tensor, features: int) -> None:
    """Raise unless x, or the gradient dy, is floating with this many features a row."""
    if x.dtype not in FLOATS_AND_DOUBLE or x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"x or dy is {x.dtype} {list(x.shape)}; it must be floating with a last dimension of {features}"
        )


def shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    """A tensor of exactly this shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be {list(expected)}")


def examples(name: str, value: object, batch: int) -> None:
    """Which examples of a cache, in any number."""
    tensor(name, value, (torch.int64, torch.int32))
    if value.dim() != 1 or bool(((value < 0) | (value >= batch)).any()):
        found = value.tolist()
        raise ValueError(
            f"{name} is {found}; it must be a list of examples of the cache, which holds {batch}"
        )


def contiguous(name: str, value: Tensor) -> None:
    """A tensor without gaps."""
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {list(value.stride())}; it must be contiguous")


def last_dim(name: str, value: Tensor, size: int, why: str) -> None:
    """A tensor whose last dimension has this size."""
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; its last dimension must be {size}, {why}"
        )


def one_of(name: str, value: object, allowed: Collection) -> None:
    """One of a few values."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be {_any_of(allowed)}")


def _any_of(values: Collection) -> str:
    *most, last = (
        str(value) if isinstance(value, torch.dtype) else repr(value) for value in values
    )
    return f"{', '.join(most)} or {last}" if most else last
