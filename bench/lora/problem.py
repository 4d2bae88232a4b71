"""Cases of the LoRA bench: tensors, the definition of outputs and gradients, and the FLOPs.

The rate counts the products of the frozen weight, for all implementations.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.measure.case import (
    BACKWARD,
    BOTH,
    FORWARD,
    SEED,
    Case,
    Instance,
    compute_results,
    largest_error,
)
from bench.nf4.layer import Layer, get_layer

SCALING = 2.0


@dataclass(frozen=True)
class LoRA(Case):
    """Layers with adapters, applied to m rows."""

    base: str = "dense"  # or nf4
    rank: int = 16  # 0: no adapter
    dropout: float = 0.0
    dora: bool = False
    projections: int = 1  # layers that share x
    adapters: int = 1  # each row has one of them, `draw_adapter_ids`

    rounds_once = True
    op = property(lambda self: f"{self.method} {self.base} {self.step}")
    variant = property(
        lambda self: f"r={self.rank}" + (f", dropout {self.dropout}" if self.dropout else "")
    )
    flops = property(
        lambda self: 2.0 * self.passes * self.projections * self.m * math.prod(self.size)
    )

    @property
    def method(self) -> str:
        if self.adapters > 1:
            return f"{self.adapters} adapters"
        return "dora" if self.dora else "qkv" if self.projections > 1 else "lora"

    @property
    def parts(self) -> tuple[str, ...]:
        methods = dict.fromkeys([self.method, "lora"])
        bases = dict.fromkeys([self.base, "dense"])
        steps = (BACKWARD, BOTH) if self.step == BOTH else (self.step,)
        return tuple(map(" ".join, itertools.product(methods, bases, steps)))

    @property
    def layer(self) -> Layer:
        return get_layer(self.shape, self.dtype, self.device)

    def make(self, peer) -> Instance:
        solved = peer.solves(self)
        model = peer.build(solved)
        x, dys = draw_inputs(solved)
        return Instance(model.call, [x], dys, [*model.frozen, *model.trained], model.trained)

    def define(self, dtype):
        """Compute outputs and gradients without dropout."""
        return define(self, None, dtype)

    @functools.cached_property
    def limit(self):
        return self.copy_with(dropout=0.0).limit if self.dropout else super().limit

    def error(self, peer, result) -> float:
        """Return the error beside what the peer solves, with the dropout of its first call."""
        solved = peer.solves(self)
        if not solved.dropout:
            return largest_error(result, compute_results(solved, torch.float64))
        torch.manual_seed(SEED)
        outs, grads = define(solved, peer.masks(solved), torch.float64)
        return largest_error(result, self.select_results(outs, grads))


class Adapter(NamedTuple):
    """Float32 numbers that bfloat16 has too, so that adapters of either dtype are the same."""

    lora_a: torch.Tensor  # [adapters, rank, in_features]
    lora_b: torch.Tensor  # [adapters, out_features, rank]
    magnitude: torch.Tensor | None  # [out_features]


def draw_inputs(problem: LoRA) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return x, and dY of each projection."""
    rows, cols = problem.size
    dys = [problem.draw_normal(2 + i, problem.m, rows) for i in range(problem.projections)]
    return problem.draw_normal(1, problem.m, cols), dys


def draw_adapter_ids(problem: LoRA) -> torch.Tensor:
    generator = torch.Generator(problem.device).manual_seed(3)
    return torch.randint(problem.adapters, (problem.m,), generator=generator, device=problem.device)


def draw_adapters(problem: LoRA) -> list[Adapter]:
    """Return an adapter for each projection, the same whatever m and the dropout are."""
    return _draw_adapters(problem.copy_with(m=0, dropout=0.0, step=FORWARD))


@functools.lru_cache(maxsize=2)
def _draw_adapters(problem: LoRA) -> list[Adapter]:
    rows, cols = problem.size
    n, r = problem.adapters, problem.rank
    adapters = []
    for i in range(problem.projections):
        generator = torch.Generator(problem.device).manual_seed(10 + i)

        def draw(*size, generator=generator):
            return torch.randn(size, generator=generator, device=problem.device)

        a, b = draw(n, r, cols) / cols**0.5, draw(n, rows, r) / (4 * r**0.5)
        a, b = a.bfloat16().float(), b.bfloat16().float()
        magnitude = None
        if problem.dora:
            norm = _row_norms(problem, a, b, torch.float32)
            magnitude = (norm * (1 + draw(rows) / 8)).bfloat16().float()
        adapters.append(Adapter(a, b, magnitude))
    return adapters


def _weight(problem: LoRA, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight as the layer holds it; exact where it is NF4 and the dtype float64."""
    is_exact = problem.base == "nf4" and dtype == torch.float64
    return (problem.layer.exact if is_exact else problem.layer.dense).to(dtype)


def _row_norms(problem: LoRA, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (_weight(problem, dtype) + SCALING * b[0].to(dtype) @ a[0].to(dtype)).norm(dim=1)


def _gain(problem: LoRA, dtype: torch.dtype) -> torch.Tensor | None:
    if not problem.dora:
        return None
    a, b, magnitude = draw_adapters(problem)[0]
    return magnitude.to(dtype) / _row_norms(problem, a, b, dtype)


@functools.lru_cache(maxsize=4)
def _base_products(problem: LoRA, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g x W^T and (sum of g dY) W, the same for all adapters but DoRA's."""
    x, dys = draw_inputs(problem)
    weight, gain = _weight(problem, dtype), _gain(problem, dtype)
    if gain is not None:
        weight = weight * gain[:, None]
    return x.to(dtype) @ weight.t(), sum(dy.to(dtype) for dy in dys) @ weight


def _shared_base_products(problem: LoRA, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base products, computed once for all cases that have the same."""
    rank = problem.rank if problem.dora else 0
    shared = problem.copy_with(rank=rank, dropout=0.0, adapters=1, step=FORWARD)
    return _base_products(shared, dtype)


def define(
    problem: LoRA, masks: Sequence[torch.Tensor] | None, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Compute the outputs, and the gradients of x, then of each projection's parameters.

    Those are A, B and, for DoRA, the magnitude. `masks` are the dropout of each projection.
    """
    y0, dx0 = _shared_base_products(problem, dtype)
    if not problem.rank:
        return [y0] * problem.projections, [dx0]
    x, dys = draw_inputs(problem)
    x, gain, ids = x.to(dtype).requires_grad_(), _gain(problem, dtype), draw_adapter_ids(problem)
    ys, leaves = [], [x]
    for i, adapter in enumerate(draw_adapters(problem)):
        parameters = [t.to(dtype, copy=True).requires_grad_() for t in adapter if t is not None]
        a, b, *magnitude = parameters
        dropped = x * masks[i].to(dtype) if masks else x
        updates = [
            (ids == j)[:, None] * (dropped @ a[j].t() @ b[j].t()) for j in range(problem.adapters)
        ]
        y = SCALING * sum(updates)
        y = y0 + (y if gain is None else gain * y)
        for m in magnitude:  # its gain is in y already, with no gradient
            y = y * (m / m.detach())
        ys.append(y)
        leaves += parameters
    grads = torch.autograd.grad(ys, leaves, [dy.to(dtype) for dy in dys])
    return [y.detach() for y in ys], [grads[0] + dx0, *grads[1:]]
