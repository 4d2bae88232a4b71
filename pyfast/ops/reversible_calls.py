"""F or G of a reversible block as something that is called twice, and what must not change in between."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from pyfast.nn.chunked import ChunkedFeedForward

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Narrow(Exception):
    """F or G returned 16 bits where exact="auto" had seen none."""


class Half:
    """F or G of a block with its arguments, called by the engine in the forward and again in the backward."""

    def __init__(
        self, name: str, function: Callable, args: tuple, kwargs: dict, wide: bool, given: "Given"
    ) -> None:
        self.name, self.function, self.args, self.wide, self.given = (
            name,
            function,
            args,
            wide,
            given,
        )
        plain = _plain(function)
        self.module = getattr(plain, "__self__", plain)
        self.parameters = partial(_parameters, plain) if torch.is_grad_enabled() else tuple
        self.frozen: list[
            tuple[Tensor, int]
        ] = []  # parameters without gradients, which no graph tells of
        self.training = getattr(self.module, "training", None)
        self.span = (0, 0, -1)  # of the streams: dimension, first, length; all of them
        self.kept: dict = {}
        self.kwargs = kwargs | ({"kept": self.kept} if getattr(function, "keeps", False) else {})

    def __str__(self) -> str:
        return self.name

    def __call__(self, x: Tensor) -> Tensor:
        version = None if x.is_inference() else x._version
        out = self.function(x, *self.args, **self.kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{self.name} returned a {type(out).__name__}; it must return a torch.Tensor"
            )
        floats = (
            out.dtype in (x.dtype, torch.float32, *SIXTEEN_BITS) and out.layout == torch.strided
        )
        if out.shape != x.shape or out.device != x.device or not floats:
            layout = "" if out.layout == torch.strided else f"{out.layout} "
            found, wanted = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (out, x))
            raise ValueError(
                f"{self.name} returned {layout}{found}; it must return floats as its input is, {wanted}"
            )
        if version is not None and x._version != version:
            raise ValueError(
                f"{self.name} changed its input in place; it must not: use inplace=False"
            )
        if self.wide and out.dtype in SIXTEEN_BITS:
            raise Narrow
        return out

    def steps(self, x: Tensor) -> list["Half"]:
        """One for each chunk of a ChunkedFeedForward, which would be computed once more in the replay; else itself."""
        function = self.function
        if not _is_chunked(function) or self.args or self.kwargs or self.accumulates():
            return [self]
        if not -x.dim() <= function.dim < x.dim():
            return [self]  # which says so
        dim, tokens = function.dim % x.dim(), x.shape[function.dim]
        chunks = []
        for first in range(0, tokens, function.chunk):
            chunks.append(Half(self.name, function.ff, (), {}, self.wide, self.given))
            chunks[-1].span = (dim, first, min(function.chunk, tokens - first))
        return chunks if len(chunks) > 1 else [self]

    def first(self, x: Tensor) -> Tensor:
        frozen = (
            p for p in self.parameters() if not (p.requires_grad or p.is_inference() or p.is_meta)
        )
        before = [(p, p._version) for p in frozen]
        out = self(x)
        self.frozen = (
            []
            if self.accumulates()
            else [(p, version) for p, version in before if p._version == version]
        )
        for name, value in self.kept.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(
                    f"{self.name} kept {name!r}, which requires gradients; it must be detached"
                )
        return out

    def again(self, x: Tensor) -> Tensor:
        if self.given.changed():
            raise RuntimeError(
                f"an argument, or tensor captured by a function, of {self.name} or another block was changed in place "
                "since; it must not be, before the backward"
            )
        if self._has_other_parameters():
            raise RuntimeError(
                f"a frozen parameter of {self.name} was changed in place or replaced since; it must not be, before the "
                "backward"
            )
        if getattr(self.module, "training", None) != self.training:
            raise RuntimeError(
                f"{self.name} had training={self.training} in the forward; train() or eval() must wait for the backward"
            )
        try:
            return self(x)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(
                f"{self.name} raised in the replay that the backward makes of it: {what}"
            ) from error

    def _has_other_parameters(self) -> bool:
        there = {id(p) for p in self.parameters()} if self.frozen else set()
        return any(p._version != version or id(p) not in there for p, version in self.frozen)

    def accumulates(self) -> bool:
        """Under fully_shard: the hooks of FSDP look for gradients in .grad, during the replay."""
        fsdp = sys.modules.get("torch.distributed.fsdp")
        return (
            fsdp is not None
            and isinstance(self.module, nn.Module)
            and any(isinstance(m, fsdp.FSDPModule) for m in self.module.modules())
        )


def _is_chunked(function: Callable) -> bool:
    """A ChunkedFeedForward whose call is its forward and nothing else."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_compiled_call_impl",
    )
    return (
        type(function) is ChunkedFeedForward
        and "forward" not in vars(function)
        and not any(getattr(function, kind) for kind in kinds)
        and not nn.modules.module._has_any_global_hook()
    )


def _plain(function: Callable) -> Callable:
    while isinstance(function, partial):
        function = function.func
    return function


def _parameters(module: object) -> list[Tensor]:
    """As module.parameters(), but sooner, and some twice; of what is no module none."""
    found, open_ = [], [module] if isinstance(module, nn.Module) else []
    for part in open_:
        found += part._parameters.values()
        open_ += filter(None, part._modules.values())
    return [p for p in found if p is not None]


def _captured(function: Callable) -> Iterator[object]:
    """What it holds: in its closure, and as a partial one."""
    while isinstance(function, partial):
        yield from _pytree.tree_leaves((function.args, function.keywords))
        function = function.func
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not yet assigned
            yield cell.cell_contents


class Given:
    """Tensors that the functions of a run are given, in any structure, or have captured.

    Those that a function changes itself in the forward, such as statistics, are its own; others
    must not be changed.
    """

    def __init__(self, functions: Iterable[tuple[Callable, Callable]], arguments: object) -> None:
        captured = (held for pair in functions for f in pair for held in _captured(f))
        found = [*_pytree.tree_leaves(arguments), *captured] if torch.is_grad_enabled() else []
        tensors = {id(t): t for t in found if isinstance(t, Tensor) and not t.is_inference()}
        self.versions = [(t, t._version) for t in tensors.values()]

    def settle(self) -> None:
        """At the end of the forward."""
        self.versions = [(t, version) for t, version in self.versions if t._version == version]

    def changed(self) -> bool:
        return any(t._version != version for t, version in self.versions)
