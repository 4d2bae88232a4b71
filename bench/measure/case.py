"""What is measured: an operation at one size, what an implementation makes of it, and the row that comes of both."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench.measure import machine
from bench.measure.machine import DTYPES
from bench.measure.peer import Peer, nbytes

STEPS = FORWARD, BACKWARD, BOTH = "forward", "backward", "fwd+bwd"
OWN_FORMAT_LIMIT = 0.25  # other 4-bit numbers than the reference's: only nonsense is caught
SEED = 0  # of torch before the first call, so that its dropout can be drawn again


@dataclass
class Row:
    """One implementation of one case: a line of the table, the CSV and the JSON."""

    op: str
    shape: str
    m: int | None
    dtype: str
    impl: str
    variant: str = ""  # what else the case is: a rank, a rate of dropout
    model: str = ""  # that has such a layer
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    calls: int = 0
    rounds: int = 0  # that the calls are from
    graph: bool = False  # a CUDA graph: launches are not in the times
    launch_ms: float | None = None  # that launching takes the host
    moved_bytes: int | None = None
    flops: float = 0.0
    gb_s: float | None = None
    tflop_s: float | None = None
    bound: str | None = None  # "copy" or "gemm": the ceiling that is nearer
    percent: float | None = None  # of that ceiling
    held_mb: float | None = None
    peak_mb: float | None = None
    saved_mb: float | None = None  # for the backward, beside parameters and weights
    max_error: float | None = None
    error_limit: float | None = None
    same_bits: bool | None = None  # as pyfast's result
    times_pyfast: float | None = None  # its time over pyfast's, by pairs in the same rounds
    ratio_p20: float | None = None  # the spread of that
    ratio_p80: float | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        """It was to run, and gave no time: it was wrong, raised or found no memory."""
        return self.ms_p50 is None and bool(self.note)

    @property
    def added_mb(self) -> float | None:
        """By a call, to what is held."""
        return None if self.peak_mb is None else self.peak_mb - self.held_mb


def as_it_is(result: Any) -> Any:
    return result


@dataclass
class Made:
    """An implementation of a case in memory of its own: a function of inputs, and what it holds."""

    function: Callable[
        ..., Any
    ]  # to one output or several; what comes after those with slopes is for the check
    inputs: list[torch.Tensor] = field(default_factory=list)
    slopes: Sequence[torch.Tensor] = ()  # the gradients of the outputs
    weights: Sequence[torch.Tensor] = ()  # held, whether trained or not
    trained: Sequence[torch.Tensor] = ()  # of these, and of the inputs, a backward gives gradients
    read: Callable[[Any], Any] = as_it_is  # out of a format of its own, for the check

    @property
    def held(self) -> int:
        return nbytes(*self.weights)

    def forward(self) -> list:
        found = self.function(*self.inputs)
        return list(found) if isinstance(found, tuple | list) else [found]

    def call(self, step: str) -> Callable[[], Any]:
        leaves = [*self.inputs, *self.trained]
        if step == FORWARD:
            return torch.no_grad()(self.forward)
        for leaf in self.inputs:
            leaf.requires_grad_()
        if step == BACKWARD:
            outs = self.forward()[: len(self.slopes)]
            return lambda: list(torch.autograd.grad(outs, leaves, self.slopes, retain_graph=True))

        def both() -> list:
            found = self.forward()
            grads = torch.autograd.grad(found[: len(self.slopes)], leaves, self.slopes)
            return [t if t is None else t.detach() for t in found] + list(grads)

        return both


@dataclass
class Trial:
    """The same call on several sets of buffers, the bytes it must move, the weight it holds and what it saves."""

    calls: list[Callable[[], Any]]
    moved: int
    held: int
    saved: int | None = None
    read: Callable[[Any], Any] = as_it_is


@dataclass(frozen=True)
class Case:
    """What a bench's cases derive from. Tensors follow from the fields, from fixed seeds.

    A subclass has `op`, its name in the records, and `flops`; `make`, an implementation; and
    `define`, the same in plain torch. `moved` it has where the rule here does not fit.
    """

    shape: str
    dtype: str
    device: str
    m: int | None = None
    step: str = FORWARD

    variant = ""
    parts = ()  # names of operations no slower than this one, measured before it
    weight = 1  # of the time, beside other cases
    rounds_once = False  # plain torch computes in float32 and rounds the result

    def make(self, peer: Peer) -> Made:
        raise NotImplementedError

    def define(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs and gradients, those of the inputs first."""
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

    def but(self, **changes) -> "Case":
        return replace(self, **changes)

    def normal(self, seed: int, *size: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(size, generator=generator, device=self.device).to(DTYPES[self.dtype])

    def of_step(self, outs: list, grads: list) -> list:
        return {FORWARD: outs, BACKWARD: grads, BOTH: [*outs, *grads]}[self.step]

    def moved(self, made: Made) -> int:
        """Forward: weights and inputs in, outputs out. Backward: those in, a gradient for each input and parameter."""
        forward = made.held + nbytes(*made.inputs, *made.slopes)
        backward = forward + nbytes(*made.inputs, *made.trained)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[self.step]

    def build(self, peer: Peer) -> Trial:
        first = self._made(peer)
        moved = self.moved(first)
        sets = [first, *(self._made(peer) for _ in range(rotation(moved, self.device) - 1))]
        calls, saved = [], None
        torch.manual_seed(SEED)
        calls = [made.call(self.step) for made in sets]
        if self.step == BOTH:
            saved = saved_bytes(first.forward, first.weights)
            torch.manual_seed(SEED)
        return Trial(calls, moved, first.held, saved, first.read)

    def _made(self, peer: Peer) -> Made:
        made = self.make(peer)
        if peer.dtype:
            made.inputs, made.slopes = (
                [t.to(peer.dtype) for t in ts] for ts in (made.inputs, made.slopes)
            )
        return made

    @functools.cached_property
    def reference(self) -> list[torch.Tensor]:
        return results(self, torch.float64)

    @functools.cached_property
    def limit(self) -> float:
        """Twice plain torch's own error in this dtype; errors above it are marked, ten times it is wrong."""
        own = DTYPES[self.dtype]
        plain = results(self, torch.float32 if self.rounds_once else own)
        return 2 * largest_error([t.to(own) for t in plain], self.reference) + 1e-6

    def limit_of(self, peer: Peer) -> float:
        return OWN_FORMAT_LIMIT if peer.own_format else self.limit

    def error(self, peer: Peer, result: list) -> float:
        return largest_error(result, self.reference)


@functools.lru_cache(maxsize=4)
def _defined(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return case.define(dtype)


def results(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of the case's step; all steps are defined at once."""
    return case.of_step(*_defined(case.but(step=BOTH), dtype))


def forget() -> None:
    """What the cases have in common."""
    _defined.cache_clear()


def differentiate(function: Callable, given: Sequence, slopes: Sequence) -> tuple[list, list]:
    """Outputs, and the gradients of all that is given."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    found = function(*leaves)
    outs = list(found) if isinstance(found, tuple | list) else [found]
    return [t.detach() for t in outs], list(torch.autograd.grad(outs, leaves, slopes))


def rotation(moved: int, device: str) -> int:
    """Sets of buffers that together are twice the last cache; 64 at most, which of the smallest cases fit in it."""
    return max(1, min(64, math.ceil(2 * machine.cache_bytes(device) / max(moved, 1))))


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """NaN where the result has one."""
    worst = (result.detach().double() - reference).abs().max()
    return float(worst / reference.abs().max())


def largest_error(found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Of each the largest difference over the largest value; over 1 where the exact ones are all 0."""
    pairs = [
        (a.reshape(b.shape).double() - b, b.abs().max().double())
        for a, b in zip(found, right, strict=True)
    ]
    errors = torch.stack(
        [wrong.abs().max() / torch.where(size > 0, size, 1) for wrong, size in pairs]
    )
    return float(errors.nan_to_num(nan=math.inf).max())


def saved_bytes(forward: Callable[[], Any], given: Sequence[torch.Tensor]) -> int:
    """What a forward saves for its backward, each storage once, without the tensors it was given."""
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.update(_storages(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for tensor in given:
        for address in _storages(tensor):
            saved.pop(address, None)
    return sum(storage.nbytes() for storage in saved.values())


def _storages(tensor: torch.Tensor) -> dict[int, torch.UntypedStorage]:
    """By address; of a tensor that wraps others, theirs."""
    if is_traceable_wrapper_subclass(tensor):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return {address: storage for part in inner for address, storage in _storages(part).items()}
    storage = tensor.untyped_storage()
    return {storage.data_ptr(): storage}
