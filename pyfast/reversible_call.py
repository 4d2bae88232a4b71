"""F or G of a reversible block as something that is called twice, and what must not change in between."""

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from pyfast.chunked import ChunkedFeedForward

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Narrow(Exception):
    """F or G returned 16 bits where exact="auto" had seen none."""


class Half:
    """F or G of a block with its arguments, called by the engine in the forward and again in the backward."""

    def __init__(self, name: str, function: Callable, args: tuple, kwargs: dict, wide: bool, given: "Given") -> None:
        self.name, self.function, self.args, self.wide, self.given = name, function, args, wide, given
        self.module = getattr(function, "__self__", function)
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
            raise TypeError(f"{self.name} returned a {type(out).__name__}; it must return a torch.Tensor")
        if out.shape != x.shape or out.device != x.device or not out.is_floating_point():
            found, wanted = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (out, x))
            raise ValueError(f"{self.name} returned {found}; it must return floats as its input is, {wanted}")
        if version is not None and x._version != version:
            raise ValueError(f"{self.name} changed its input in place; it must not: use inplace=False")
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
        out = self(x)
        for name, value in self.kept.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{self.name} kept {name!r}, which requires gradients; it must be detached")
        return out

    def again(self, x: Tensor) -> Tensor:
        if self.given.changed():
            raise RuntimeError(
                f"an argument, or tensor captured by a function, of {self.name} or another block was changed in place "
                "since; it must not be, before the backward"
            )
        if getattr(self.module, "training", None) != self.training:
            raise RuntimeError(
                f"{self.name} had training={self.training} in the forward; train() or eval() must wait for the backward"
            )
        try:
            return self(x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"{self.name} raised in the replay that the backward makes of it: {what}") from error

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
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
    return (
        type(function) is ChunkedFeedForward
        and "forward" not in vars(function)
        and not any(getattr(function, kind) for kind in kinds)
        and not nn.modules.module._has_any_global_hook()
    )


class Given:
    """Tensors that the functions of a run are given, in any structure, or have captured.

    Those that a function changes itself in the forward, such as statistics, are its own; others must not be changed.
    """

    def __init__(self, functions: Iterable[tuple[Callable, Callable]], arguments: object) -> None:
        cells = [cell for pair in functions for f in pair for cell in getattr(f, "__closure__", None) or ()]
        found = [*_pytree.tree_leaves(arguments), *map(_content, cells)] if torch.is_grad_enabled() else []
        tensors = {id(t): t for t in found if isinstance(t, Tensor) and not t.is_inference()}
        self.versions = [(t, t._version) for t in tensors.values()]

    def settle(self) -> None:
        """At the end of the forward."""
        self.versions = [(t, version) for t, version in self.versions if t._version == version]

    def changed(self) -> bool:
        return any(t._version != version for t, version in self.versions)


def _content(cell: object) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None
