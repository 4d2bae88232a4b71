"""The contract of an op, made once: the compiled half, registration per device, autocast, one-time notices."""

import importlib.metadata
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from pyfast._support import checks

_CURE = "reinstall it for this torch: pip install --force-reinstall --no-deps --no-build-isolation <pyfast checkout>"


def _load_compiled():
    """pyfast._C, or an ImportError that says which torch it was built for."""
    try:
        from pyfast import _C
    except ImportError as error:
        message = f"pyfast's compiled part does not load under torch {torch.__version__}"
        if built := _required_torch():
            message += f" (it was built for torch {built})"
        raise ImportError(f"{message}; {_CURE}. The loader said: {error}") from error
    if _series(_C.torch_version) != _series(torch.__version__):
        raise ImportError(f"pyfast was built for torch {_C.torch_version} and found {torch.__version__}; {_CURE}")
    wanted = os.environ.get("PYFAST_CPU")
    if wanted and _C.isa() != wanted:  # an unknown name is a ValueError from isa() itself
        warnings.warn(f"pyfast: {_C.isa_reason()}; {_C.isa()} kernels run instead", stacklevel=2)
    return _C


def _series(version: str) -> list[str]:
    return version.split(".")[:2]


def _required_torch() -> str | None:
    try:
        requirements = importlib.metadata.requires("pyfast-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((r.removeprefix("torch==") for r in requirements if r.startswith("torch==")), None)


C = _load_compiled()


def register(
    op: str, *, fake: Callable, cuda: Callable | None, reference: Callable, double: Callable | None = None
) -> Callable:
    """Completes `pyfast::op`, whose schema and CPU kernel are C++ (csrc/ops/nf4.cpp), and returns it.

    `fake` gives shapes, `cuda` launches Triton, `reference` serves every other device, and CUDA without Triton. No
    `cuda`: its kernel is C++ too, or `reference` where it was not built.
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
            warn_once(f"{op} needs Triton, {why}: plain torch runs instead, slowly; pip install triton")
            return exactly(reference, *args)
        device = _device_of(args)  # Triton launches on the current device, whatever the arguments'
        with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
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
    """An op made of torch's: autocast chose its arguments' dtypes and is not to change others; no gaps, as in fakes.

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


# Looked up once: torch.compile does not trace the question before torch 2.12.
_DEVICES = "cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu", torch._C._get_privateuse1_backend_name()
_AUTOCASTING = frozenset(filter(torch.amp.is_autocast_available, _DEVICES))


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there."""
    return device.type in _AUTOCASTING and torch.is_autocast_enabled(device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or autocast's where autocast is on, as for torch's own linear ops."""
    lowered = x.is_floating_point() and x.dtype != torch.float64 and autocasts(x.device)
    return torch.get_autocast_dtype(x.device.type) if lowered else x.dtype


def seed_tensor(x: Tensor, seed: int | Tensor | None) -> Tensor:
    """A scalar where x is; by default a new one from torch's generator."""
    if seed is None:
        return torch.randint(2**63 - 1, (), device=x.device)
    checks.seed(seed)
    if isinstance(seed, Tensor):
        if seed.numel() != 1:
            raise ValueError(f"seed has shape {list(seed.shape)}; it must be one number")
        return seed.reshape(()).to(x.device)
    # Any 64 bits; filled in there, since a CUDA graph takes no copy from the host.
    return torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=x.device)


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Slow or missing paths say so, once a process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"pyfast: {message}", stacklevel=3)


def _device_of(args: tuple) -> torch.device:
    return _first_tensor(args).device


def _first_tensor(args: tuple) -> Tensor:
    """Be it in a list."""
    for arg in args:
        for tensor in arg if isinstance(arg, list | tuple) else [arg]:
            if isinstance(tensor, Tensor):
                return tensor
    raise ValueError("no argument is a tensor; at least one must be")
