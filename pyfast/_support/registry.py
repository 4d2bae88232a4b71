"""The contract of an op, made once: the compiled half, registration per device, autocast, one-time notices."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from pyfast._support import extension  # noqa: F401 - loads the schemas
from pyfast._support.notices import warn_once


def register(
    op: str,
    *,
    fake: Callable,
    cuda: Callable | None,
    reference: Callable,
    double: Callable | None = None,
) -> Callable:
    """Completes `pyfast::op`, whose schema and CPU kernel are C++ (csrc/ops/nf4.cpp), and returns
    it.

    `fake` gives shapes, `cuda` launches Triton, `reference` serves every other device, and CUDA
    without Triton. No `cuda`: its kernel is C++ too, or `reference` where it was not built.
    `double`, if given, is called instead of the op when the first tensor is float64.
    """
    name = f"pyfast::{op}"
    torch.library.register_fake(name, fake)

    def fallback(*args):
        device = _device_of(args).type
        cure = "; it needs nvcc when pyfast is built" if cuda is None and device == "cuda" else ""
        warn_once(f"{op} has no kernel for {device}: plain torch runs instead, slowly{cure}")
        return exactly(reference, *args)

    def on_cuda(*args):
        if why := triton_missing():
            warn_once(
                f"{op} needs Triton, {why}: plain torch runs instead, slowly; pip install triton"
            )
            return exactly(reference, *args)
        device = _device_of(args)  # Triton launches on the current device, whatever the arguments'
        with (
            nullcontext()
            if device.index == torch.cuda.current_device()
            else torch.cuda.device(device)
        ):
            return cuda(*args)

    _registered[op] = cuda is not None
    if cuda is not None:
        torch.library.impl(name, "CUDA", on_cuda)
    torch.library.impl(name, "CompositeExplicitAutograd", fallback)
    compiled = getattr(torch.ops.pyfast, op).default
    if double is None:
        return compiled
    return lambda *args: (double if _first_tensor(args).dtype == torch.float64 else compiled)(*args)


def exactly(function: Callable, *args):
    """An op made of torch's: autocast chose its arguments' dtypes and is not to change others; no
    gaps, as in fakes.

    A function that `lays_out` its results has seen to that.
    """
    device = _device_of(args).type
    lowers = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if lowers else nullcontext():
        found = function(*args)
    if getattr(function, "lays_out", False):
        return found
    return found.contiguous() if isinstance(found, Tensor) else tuple(t.contiguous() for t in found)


_registered: dict[str, bool] = {}  # whether it has a Triton kernel


def registered() -> list[str]:
    """The ops, in the order they were registered."""
    return list(_registered)


def has_triton(op: str) -> bool:
    """Whether its GPU kernel is Triton's; else it is C++."""
    return _registered[op]


@cache
def triton_missing() -> str | None:
    """Why Triton can't be used, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"which does not import ({error})"
    return None


def _device_of(args: tuple) -> torch.device:
    return _first_tensor(args).device


def _first_tensor(args: tuple) -> Tensor:
    """Be it in a list."""
    for arg in args:
        for tensor in arg if isinstance(arg, list | tuple) else [arg]:
            if isinstance(tensor, Tensor):
                return tensor
    raise ValueError("no argument is a tensor; at least one must be")
