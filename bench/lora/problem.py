"""What the LoRA bench computes: tensors, the definition of outputs and gradients, and the FLOPs.

The rate counts the products of the frozen weight, for all.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.measure.case import BACKWARD, BOTH, FORWARD, SEED, Case, Made, largest_error, results
from bench.nf4.peers import Layer, layer

SCALING = 2.0


@dataclass(frozen=True)
class LoRA(Case):
    """Layers with adapters, applied to m rows."""

    base: str = "dense"  # or nf4
    rank: int = 16  # 0: no adapter
    dropout: float = 0.0
    dora: bool = False
    projections: int = 1  # layers that share x
    adapters: int = 1  # of which each row has one, `adapter_ids`

    rounds_once = True
    op = property(lambda self: f"{self.kind} {self.base} {self.step}")
    variant = property(
        lambda self: f"r={self.rank}" + (f", dropout {self.dropout}" if self.dropout else "")
    )
    flops = property(
        lambda self: 2.0 * self.passes * self.projections * self.m * math.prod(self.size)
    )

    @property
    def kind(self) -> str:
        if self.adapters > 1:
            return f"{self.adapters} adapters"
        return "dora" if self.dora else "qkv" if self.projections > 1 else "lora"

    @property
    def parts(self) -> tuple[str, ...]:
        steps = (BACKWARD, BOTH) if self.step == BOTH else (self.step,)
        names = itertools.product(
            dict.fromkeys([self.kind, "lora"]), dict.fromkeys([self.base, "dense"]), steps
        )
        return tuple(map(" ".join, names))

    @property
    def layer(self) -> Layer:
        return layer(self.shape, self.dtype, self.device)

    def make(self, peer) -> Made:
        solved = peer.solves(self)
        model = peer.build(solved)
        x, dys = inputs(solved)
        return Made(model.call, [x], dys, [*model.frozen, *model.trained], model.trained)

    def define(self, dtype):
        """Without dropout."""
        return define(self, None, dtype)

    @functools.cached_property
    def limit(self):
        return self.but(dropout=0.0).limit if self.dropout else super().limit

    def error(self, peer, result) -> float:
        """Of what the implementation solves, with the dropout of its first call."""
        solved = peer.solves(self)
        if not solved.dropout:
            return largest_error(result, results(solved, torch.float64))
        torch.manual_seed(SEED)
        return largest_error(
            result, self.of_step(*define(solved, peer.masks(solved), torch.float64))
        )


class Adapter(NamedTuple):
    """Float32, of values that bfloat16 has too, so that adapters of either dtype are the same ones."""

    lora_a: torch.Tensor  # [adapters, rank, in]
    lora_b: torch.Tensor  # [adapters, out, rank]
    magnitude: torch.Tensor | None  # [out]


def inputs(problem: LoRA) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """X, and dY of each projection."""
    rows, cols = problem.size
    dys = [problem.normal(2 + i, problem.m, rows) for i in range(problem.projections)]
    return problem.normal(1, problem.m, cols), dys


def adapter_ids(problem: LoRA) -> torch.Tensor:
    generator = torch.Generator(problem.device).manual_seed(3)
    return torch.randint(problem.adapters, (problem.m,), generator=generator, device=problem.device)


def adapters(problem: LoRA) -> list[Adapter]:
    """One for each projection, whatever m and the dropout."""
    return _adapters(problem.but(m=0, dropout=0.0, step=FORWARD))


@functools.lru_cache(maxsize=2)
def _adapters(problem: LoRA) -> list[Adapter]:
    rows, cols = problem.size
    n, r = problem.adapters, problem.rank
    found = []
    for i in range(problem.projections):
        generator = torch.Generator(problem.device).manual_seed(10 + i)

        def draw(*size, generator=generator):
            return torch.randn(size, generator=generator, device=problem.device)

        a, b = draw(n, r, cols) / cols**0.5, draw(n, rows, r) / (4 * r**0.5)
        a, b = a.bfloat16().float(), b.bfloat16().float()
        magnitude = None
        if problem.dora:
            norm = _norm(problem, a, b, torch.float32)
            magnitude = (norm * (1 + draw(rows) / 8)).bfloat16().float()
        found.append(Adapter(a, b, magnitude))
    return found


def _weight(problem: LoRA, dtype: torch.dtype) -> torch.Tensor:
    """As the layer holds it: exact where 4 bits do and the dtype can."""
    exact = problem.base == "nf4" and dtype == torch.float64
    return (problem.layer.exact if exact else problem.layer.dense).to(dtype)


def _norm(problem: LoRA, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (_weight(problem, dtype) + SCALING * b[0].to(dtype) @ a[0].to(dtype)).norm(dim=1)


def _gain(problem: LoRA, dtype: torch.dtype) -> torch.Tensor | None:
    if not problem.dora:
        return None
    a, b, magnitude = adapters(problem)[0]
    return magnitude.to(dtype) / _norm(problem, a, b, dtype)


@functools.lru_cache(maxsize=4)
def _base_products(problem: LoRA, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """g x W^T and (sum of g dY) W, the same for all adapters but DoRA's."""
    x, dys = inputs(problem)
    weight, gain = _weight(problem, dtype), _gain(problem, dtype)
    if gain is not None:
        weight = weight * gain[:, None]
    return x.to(dtype) @ weight.t(), sum(dy.to(dtype) for dy in dys) @ weight


def _base(problem: LoRA, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rank = problem.rank if problem.dora else 0
    return _base_products(problem.but(rank=rank, dropout=0.0, adapters=1, step=FORWARD), dtype)


def define(
    problem: LoRA, masks: Sequence[torch.Tensor] | None, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ys, and the gradients of x, then of A, B (and DoRA's magnitude) of each projection."""
    y0, dx0 = _base(problem, dtype)
    if not problem.rank:
        return [y0] * problem.projections, [dx0]
    x, dys = inputs(problem)
    x, gain, ids = x.to(dtype).requires_grad_(), _gain(problem, dtype), adapter_ids(problem)
    ys, leaves = [], [x]
    for i, adapter in enumerate(adapters(problem)):
        a, b, *magnitude = own = [
            t.to(dtype, copy=True).requires_grad_() for t in adapter if t is not None
        ]
        dropped = x * masks[i].to(dtype) if masks else x
        parts = [
            (ids == j)[:, None] * (dropped @ a[j].t() @ b[j].t()) for j in range(problem.adapters)
        ]
        y = SCALING * sum(parts)
        y = y0 + (y if gain is None else gain * y)
        for m in magnitude:  # its gain is in y already, with no gradient
            y = y * (m / m.detach())
        ys.append(y)
        leaves += own
    grads = torch.autograd.grad(ys, leaves, [dy.to(dtype) for dy in dys])
    return [y.detach() for y in ys], [grads[0] + dx0, *grads[1:]]
