"""The calls of F and G in reversible blocks, and the checks that both calls of each are alike."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class SixteenBitOutput(Exception):
    """Signal that F or G returned 16 bits.

    The streams of a run are 32 bits wide as long as neither does.
    """


class BlockFunction:
    """F or G of a block with its arguments.

    The engine calls `record` in the forward and `replay` in the backward, with the same input.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        args: tuple,
        kwargs: dict,
        refuse_sixteen_bits: bool,
        watched: "WatchedTensors",
    ) -> None:
        self.name, self.function, self.args = name, function, args
        self.refuse_sixteen_bits = refuse_sixteen_bits
        self.watched = watched
        unwrapped = _unwrap_partial(function)
        self.module = getattr(unwrapped, "__self__", unwrapped)
        can_replay = torch.is_grad_enabled()
        self.list_parameters = partial(_list_parameters, unwrapped) if can_replay else tuple
        # Frozen parameters with their versions. No graph tells that they were read.
        self.frozen: list[tuple[Tensor, int]] = []
        self.training = getattr(self.module, "training", None)
        self.span = (0, 0, -1)  # dimension, start and length of x; -1: all of it
        self.kept: dict = {}
        self.kwargs = kwargs | ({"kept": self.kept} if getattr(function, "keeps", False) else {})

    def __str__(self) -> str:
        return self.name

    def __call__(self, x: Tensor) -> Tensor:
        version = None if x.is_inference() else x._version
        out = self.function(x, *self.args, **self.kwargs)
        self._check_output(out, x)
        if version is not None and x._version != version:
            raise ValueError(
                f"{self.name} changed its input in place; it must not: use inplace=False"
            )
        if self.refuse_sixteen_bits and out.dtype in SIXTEEN_BITS:
            raise SixteenBitOutput
        return out

    def _check_output(self, out: object, x: Tensor) -> None:
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{self.name} returned a {type(out).__name__}; it must return a torch.Tensor"
            )
        is_strided = out.layout == torch.strided
        has_dtype = out.dtype in (x.dtype, torch.float32, *SIXTEEN_BITS)
        if out.shape != x.shape or out.device != x.device or not (has_dtype and is_strided):
            layout = "" if is_strided else f"{out.layout} "
            actual, expected = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (out, x))
            raise ValueError(
                f"{self.name} returned {layout}{actual}; it must return floats as its input is, "
                f"{expected}"
            )

    def split(self, x: Tensor) -> list["BlockFunction"]:
        """Return one BlockFunction for each chunk of x that the function asks for, or this one.

        A module that computes its output chunk by chunk can have a method `reversible_chunks(x)`.
        This returns a function, a dimension and the lengths of the chunks along it, or None. Each
        chunk is then recorded and replayed alone. Without the method, a module that checkpoints
        its chunks would compute them once more in the replay.
        """
        # Looked up on the class, since wrappers pass attributes of the wrapped module on.
        reversible_chunks = getattr(type(self.function), "reversible_chunks", None)
        if reversible_chunks is None or self.args or self.kwargs:
            return [self]
        if not _has_plain_call(self.function) or self.is_fully_sharded():
            return [self]
        parts = reversible_chunks(self.function, x)
        if parts is None:
            return [self]
        function, dim, lengths = parts
        if len(lengths) < 2:
            return [self]
        chunks, start = [], 0
        for length in lengths:
            chunk = BlockFunction(
                self.name, function, (), {}, self.refuse_sixteen_bits, self.watched
            )
            chunk.span = (dim, start, length)
            chunks.append(chunk)
            start += length
        return chunks

    def record(self, x: Tensor) -> Tensor:
        """Call the function for the first time, and note what must not change until the replay."""
        versions = []
        for parameter in self.list_parameters():
            if not (parameter.requires_grad or parameter.is_inference() or parameter.is_meta):
                versions.append((parameter, parameter._version))
        out = self(x)
        self.frozen = []
        if not self.is_fully_sharded():
            self.frozen = [(p, version) for p, version in versions if p._version == version]
        for name, value in self.kept.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(
                    f"{self.name} kept {name!r}, which requires gradients; it must be detached"
                )
        return out

    def replay(self, x: Tensor) -> Tensor:
        """Call the function again, after checking that nothing it depends on has changed."""
        if self.watched.have_changed():
            raise RuntimeError(
                f"an argument, or tensor captured by a function, of {self.name} or another block "
                "was changed in place since; it must not be, before the backward"
            )
        if self._has_other_parameters():
            raise RuntimeError(
                f"a frozen parameter of {self.name} was changed in place or replaced since; "
                "it must not be, before the backward"
            )
        if getattr(self.module, "training", None) != self.training:
            raise RuntimeError(
                f"{self.name} had training={self.training} in the forward; "
                "train() or eval() must wait for the backward"
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

    first, again = record, replay  # the names that csrc/reversible/replay.cpp calls

    def _has_other_parameters(self) -> bool:
        if not self.frozen:
            return False
        ids = {id(parameter) for parameter in self.list_parameters()}
        return any(p._version != version or id(p) not in ids for p, version in self.frozen)

    def is_fully_sharded(self) -> bool:
        """Return whether FSDP2's fully_shard was applied to the module or to one inside it.

        The replay must then accumulate gradients in .grad, where FSDP's hooks look for them.
        """
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is None or not isinstance(self.module, nn.Module):
            return False
        return any(isinstance(module, fsdp.FSDPModule) for module in self.module.modules())


def _has_plain_call(function: Callable) -> bool:
    """Return whether a call is a module's forward and nothing else."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_compiled_call_impl",
    )
    return (
        isinstance(function, nn.Module)
        and "forward" not in vars(function)
        and not any(getattr(function, name) for name in hooks)
        and not nn.modules.module._has_any_global_hook()
    )


def _unwrap_partial(function: Callable) -> Callable:
    while isinstance(function, partial):
        function = function.func
    return function


def _list_parameters(module: object) -> list[Tensor]:
    """Return the parameters of a module and its children; none if it is no module.

    This is faster than `module.parameters()`, and repeats parameters that are shared.
    """
    parameters = []
    modules = [module] if isinstance(module, nn.Module) else []
    for submodule in modules:  # which grows meanwhile
        parameters += submodule._parameters.values()
        modules += filter(None, submodule._modules.values())
    return [parameter for parameter in parameters if parameter is not None]


def _list_captured(function: Callable) -> Iterator[object]:
    """Yield the objects that a function holds in its closure, or as a partial function."""
    while isinstance(function, partial):
        yield from _pytree.tree_leaves((function.args, function.keywords))
        function = function.func
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # a variable that is not yet assigned
            yield cell.cell_contents


class WatchedTensors:
    """The tensors that a run must not change: arguments, and what functions captured.

    Arguments may be of any structure. A function may change some tensors in the forward, such as
    statistics. These are no longer watched. All others must not change before the backward.
    """

    def __init__(self, functions: Iterable[tuple[Callable, Callable]], arguments: object) -> None:
        objects = []
        if torch.is_grad_enabled():
            objects += _pytree.tree_leaves(arguments)
            for pair in functions:
                for function in pair:
                    objects += _list_captured(function)
        tensors = {id(t): t for t in objects if isinstance(t, Tensor) and not t.is_inference()}
        self.versions = [(t, t._version) for t in tensors.values()]

    def drop_changed(self) -> None:
        """Stop watching what the forward changed, at its end."""
        self.versions = [(t, version) for t, version in self.versions if t._version == version]

    def have_changed(self) -> bool:
        return any(t._version != version for t, version in self.versions)
