"""Cases and instances of them.

A case is an operation at one size. An implementation makes an instance of it, and measuring the
instance gives a row.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench.measure import machine
from bench.measure.machine import DTYPES
from bench.measure.peer import Peer, count_bytes

STEPS = FORWARD, BACKWARD, BOTH = "forward", "backward", "fwd+bwd"
DIFFERENT_FORMAT_LIMIT = 0.25  # for 4-bit formats unlike the reference's: catches only nonsense
SEED = 0  # of torch before the first call, so that its dropout can be drawn again
MAX_BUFFER_SETS = 64


def identity(result: Any) -> Any:
    return result


@dataclass
class Instance:
    """An implementation of a case with tensors of its own."""

    # Returns one output or several. Outputs after those with gradients are for the check only.
    function: Callable[..., Any]
    inputs: list[torch.Tensor] = field(default_factory=list)
    output_grads: Sequence[torch.Tensor] = ()
    weights: Sequence[torch.Tensor] = ()  # held, whether trained or not
    trained: Sequence[torch.Tensor] = ()  # get gradients in a backward, as the inputs do
    decode: Callable[[Any], Any] = identity  # from a format of its own, for the check

    @property
    def held_bytes(self) -> int:
        return count_bytes(*self.weights)

    def forward(self) -> list:
        result = self.function(*self.inputs)
        return list(result) if isinstance(result, tuple | list) else [result]

    def make_call(self, step: str) -> Callable[[], Any]:
        """Return a function without arguments that runs the forward, the backward, or both."""
        leaves = [*self.inputs, *self.trained]
        if step == FORWARD:
            return torch.no_grad()(self.forward)
        for leaf in self.inputs:
            leaf.requires_grad_()
        grads = self.output_grads
        if step == BACKWARD:
            outs = self.forward()[: len(grads)]
            return lambda: list(torch.autograd.grad(outs, leaves, grads, retain_graph=True))

        def run_both() -> list:
            outs = self.forward()
            input_grads = torch.autograd.grad(outs[: len(grads)], leaves, grads)
            return [t if t is None else t.detach() for t in outs] + list(input_grads)

        return run_both


@dataclass
class Trial:
    """The same call on several sets of buffers, with the bytes it moves, holds and saves."""

    calls: list[Callable[[], Any]]
    moved_bytes: int
    held_bytes: int
    saved_bytes: int | None = None
    decode: Callable[[Any], Any] = identity


@dataclass(frozen=True)
class Case:
    """Base class of a bench's cases; tensors follow from the fields, from fixed seeds.

    A subclass defines `op`, its name in the records; `flops`; `make`, which builds an
    implementation; and `define`, which computes the same in plain torch. It overrides
    `moved_bytes` where the rule here does not fit.
    """

    shape: str
    dtype: str
    device: str
    m: int | None = None
    step: str = FORWARD

    variant = ""
    parts = ()  # names of operations no slower than this one, measured before it
    time_weight = 1  # its share of the time, beside other cases
    rounds_once = False  # plain torch computes in float32 and rounds the result

    def make(self, peer: Peer) -> Instance:
        raise NotImplementedError

    def define(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Compute outputs and gradients in plain torch; the inputs' gradients come first."""
        raise NotImplementedError

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(map(int, self.shape.split("x")))

    @property
    def passes(self) -> int:
        return 2 if self.step == BOTH else 1

    @property
    def title(self) -> str:
        size = f" M={self.m}" if self.m else ""
        return f"{self.op} {self.shape} {self.dtype}{size} {self.variant}".rstrip()

    def copy_with(self, **changes) -> "Case":
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def draw_normal(self, seed: int, *size: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(size, generator=generator, device=self.device).to(DTYPES[self.dtype])

    def select_results(self, outs: list, grads: list) -> list:
        """Return the results that the case's step has: outputs, gradients or both."""
        return {FORWARD: outs, BACKWARD: grads, BOTH: [*outs, *grads]}[self.step]

    def moved_bytes(self, instance: Instance) -> int:
        """Return the bytes that must move.

        A forward reads weights and inputs and writes outputs. A backward reads those, and writes
        a gradient for each input and parameter.
        """
        forward = instance.held_bytes + count_bytes(*instance.inputs, *instance.output_grads)
        backward = forward + count_bytes(*instance.inputs, *instance.trained)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[self.step]

    def build(self, peer: Peer) -> Trial:
        """Build as many instances as rotate through the last cache, and their calls."""
        first = self._make_instance(peer)
        moved = self.moved_bytes(first)
        count = count_buffer_sets(moved, self.device)
        instances = [first, *(self._make_instance(peer) for _ in range(count - 1))]
        torch.manual_seed(SEED)
        calls = [instance.make_call(self.step) for instance in instances]
        saved = None
        if self.step == BOTH:
            saved = measure_saved_bytes(first.forward, first.weights)
            torch.manual_seed(SEED)
        return Trial(calls, moved, first.held_bytes, saved, first.decode)

    def _make_instance(self, peer: Peer) -> Instance:
        instance = self.make(peer)
        if peer.dtype:
            instance.inputs = [t.to(peer.dtype) for t in instance.inputs]
            instance.output_grads = [t.to(peer.dtype) for t in instance.output_grads]
        return instance

    @functools.cached_property
    def reference(self) -> list[torch.Tensor]:
        return compute_results(self, torch.float64)

    @functools.cached_property
    def limit(self) -> float:
        """Twice plain torch's error in this dtype.

        Errors above it are noted; above ten times it the implementation counts as wrong.
        """
        dtype = DTYPES[self.dtype]
        plain = compute_results(self, torch.float32 if self.rounds_once else dtype)
        return 2 * largest_error([t.to(dtype) for t in plain], self.reference) + 1e-6

    def limit_for(self, peer: Peer) -> float:
        return DIFFERENT_FORMAT_LIMIT if peer.has_different_format else self.limit

    def error(self, peer: Peer, result: list) -> float:
        return largest_error(result, self.reference)


@functools.lru_cache(maxsize=4)
def _define_both_steps(
    case: Case, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return case.define(dtype)


def compute_results(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the results of the case's step in plain torch; all steps are computed at once."""
    return case.select_results(*_define_both_steps(case.copy_with(step=BOTH), dtype))


def clear_definitions() -> None:
    """Release the cached definitions that cases share."""
    _define_both_steps.cache_clear()


def differentiate(
    function: Callable, arguments: Sequence[torch.Tensor], output_grads: Sequence[torch.Tensor]
) -> tuple[list, list]:
    """Return the outputs of a function, and the gradients of all its arguments."""
    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    result = function(*leaves)
    outs = list(result) if isinstance(result, tuple | list) else [result]
    return [t.detach() for t in outs], list(torch.autograd.grad(outs, leaves, output_grads))


def count_buffer_sets(moved: int, device: str) -> int:
    """Return how many sets of buffers are together twice the last cache.

    It is 64 at most; 64 sets of the smallest cases fit into the cache.
    """
    count = math.ceil(2 * machine.cache_bytes(device) / max(moved, 1))
    return max(1, min(MAX_BUFFER_SETS, count))


def largest_error(results: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> float:
    """Return the largest difference, each over its reference's largest value.

    Where a reference is all zeros the difference is divided by 1. NaN counts as infinite.
    """
    errors = []
    for result, reference in zip(results, references, strict=True):
        difference = (result.reshape(reference.shape).double() - reference).abs().max()
        size = reference.abs().max().double()
        errors.append(difference / torch.where(size > 0, size, 1))
    return float(torch.stack(errors).nan_to_num(nan=math.inf).max())


def measure_saved_bytes(forward: Callable[[], Any], excluded: Sequence[torch.Tensor]) -> int:
    """Return the bytes that a forward saves for its backward, each storage once.

    Tensors in `excluded`, the ones it was called with, do not count.
    """
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages.update(_storages_by_address(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for tensor in excluded:
        for address in _storages_by_address(tensor):
            storages.pop(address, None)
    return sum(storage.nbytes() for storage in storages.values())


def _storages_by_address(tensor: torch.Tensor) -> dict[int, torch.UntypedStorage]:
    """Return the storage of a tensor, or those of the tensors that it wraps."""
    if not is_traceable_wrapper_subclass(tensor):
        storage = tensor.untyped_storage()
        return {storage.data_ptr(): storage}
    storages = {}
    for name in tensor.__tensor_flatten__()[0]:
        storages |= _storages_by_address(getattr(tensor, name))
    return storages
