"""Registration of ops: checks, fakes, Triton kernels, and plain torch where there are none."""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial

import torch
from torch import Tensor

from pyfast._support import (
    dtypes,
    extension,  # noqa: F401 - loads the schemas
)
from pyfast._support.notices import warn_once

_DOUBLE = torch.float64


def register(
    op: str,
    *,
    check: Callable | None = None,
    fake: Callable,
    kernel: str | None,
    launch: Callable | None = None,
    reference: Callable,
    is_composite: bool = False,
    keeps_layout: bool = False,
) -> Callable:
    """Complete `pyfast::op`, whose schema and CPU kernel are C++ (csrc/ops), and return it.

    All functions take the op's arguments, of which the first is a tensor or a list of tensors.
    float64 goes to the reference, because no Triton kernel computes in it.

    Args:
        op: The name in the schema.
        check: Raises unless sizes, devices and dtypes are what memory safety rests on. It runs
            before the fake, the kernel and the reference.
        fake: Returns empty results.
        kernel: The Triton launcher as "module:function" of `pyfast.kernels`, found at the first
            launch. None: the GPU kernel is C++, too.
        launch: Called as launch(launcher, *arguments), where the launcher wants another layout or
            further arguments. Default: launcher(*arguments).
        reference: The op in plain torch, for float64, for devices without a kernel, and for CUDA
            without Triton.
        is_composite: Whether the reference is the implementation on every device.
        keeps_layout: Whether the reference lays out its results as the fake does. Default: they
            are made contiguous.
    """
    parts = _Registration(op, check, fake, kernel, launch, reference, keeps_layout)
    name, compiled = f"pyfast::{op}", getattr(torch.ops.pyfast, op).default
    torch.library.register_fake(name, parts.run_fake)
    if is_composite:
        torch.library.impl(name, "CompositeExplicitAutograd", parts.run_reference)
        return compiled
    _registrations[op] = parts
    torch.library.impl(name, "CompositeExplicitAutograd", parts.run_fallback)
    if kernel is None:
        return compiled
    torch.library.impl(name, "CUDA", parts.run_on_cuda)

    def call(*args):
        is_double = first_tensor(args).dtype is _DOUBLE
        return parts.run_reference(*args) if is_double else compiled(*args)

    return call


class _Registration:
    """The parts of an op, and what the dispatcher calls on each kind of device."""

    def __init__(self, op, check, fake, kernel, launch, reference, keeps_layout) -> None:
        self.op, self.fake, self.kernel, self.launch = op, fake, kernel, launch
        self.reference, self.keeps_layout = reference, keeps_layout
        self.check = check or (lambda *args: None)
        self._launcher: Callable | None = None  # found at the first launch

    def run_fake(self, *args):
        """Return empty results for checked arguments."""
        self.check(*args)
        return self.fake(*args)

    def run_reference(self, *args):
        """Run the op in plain torch on checked arguments.

        Autocast is off, because the dtypes were chosen before. Results lie in memory as the fake
        promises.
        """
        self.check(*args)
        device = first_tensor(args).device.type
        with (
            torch.autocast(device, enabled=False) if dtypes.has_autocast(device) else nullcontext()
        ):
            result = self.reference(*args)
        if self.keeps_layout or result is None:
            return result
        if isinstance(result, Tensor):
            return result.contiguous()
        return tuple(tensor.contiguous() for tensor in result)

    def run_fallback(self, *args):
        """Run the op in plain torch, and say once that there is no kernel."""
        device = first_tensor(args).device.type
        needs_nvcc = self.kernel is None and device == "cuda"
        cure = "; it needs nvcc when pyfast is built" if needs_nvcc else ""
        warn_once(f"{self.op} has no kernel for {device}: plain torch runs instead, slowly{cure}")
        return self.run_reference(*args)

    def run_kernel(self, *args):
        """Launch the Triton kernel on checked arguments, on the current device."""
        if first_tensor(args).dtype == torch.float64:
            return self.run_reference(*args)
        self.check(*args)
        if self._launcher is None:
            self._launcher = self._find_launcher()
        return self._launcher(*args)

    def run_on_cuda(self, *args):
        """Launch the Triton kernel on the device of the arguments."""
        if self._launcher is None and (why := triton_missing()):
            warn_once(
                f"{self.op} needs Triton, {why}: plain torch runs instead, slowly; "
                "pip install triton"
            )
            return self.run_reference(*args)
        device = first_tensor(args).device
        if device.index == torch.cuda.current_device():
            return self.run_kernel(*args)
        with torch.cuda.device(device):
            return self.run_kernel(*args)

    def _find_launcher(self) -> Callable:
        launcher = find_launcher(self.kernel)
        return launcher if self.launch is None else partial(self.launch, launcher)


_registrations: dict[str, _Registration] = {}  # those with kernels, in the order of registration


def registered() -> list[str]:
    """Return the names of the ops that have kernels, in the order they were registered."""
    return list(_registrations)


def has_triton(op: str) -> bool:
    """Return whether the op's GPU kernel is Triton's; otherwise it is C++."""
    return _registrations[op].kernel is not None


def run_kernel(op: str, *args):
    """Check the arguments and launch the op's Triton kernel, also in Triton's interpreter."""
    return _registrations[op].run_kernel(*args)


@cache
def find_launcher(kernel: str) -> Callable:
    """Return the launcher "module:function" of `pyfast.kernels`; the first call imports it."""
    module, function = kernel.split(":")
    return getattr(importlib.import_module(f"pyfast.kernels.{module}"), function)


@cache
def triton_missing() -> str | None:
    """Return why Triton cannot be used, or None."""
    try:
        import triton  # noqa: F401 - optional
    except ImportError as error:
        return f"which does not import ({error})"
    return None


def first_tensor(args: tuple) -> Tensor:
    """Return the first argument, or its first element if it is a list."""
    first = args[0]
    if isinstance(first, Tensor):
        return first
    if not first:
        raise ValueError("no argument is a tensor; at least one must be")
    return first[0]
