"""What the LoRA bench computes: tensors, and the definition of outputs and gradients."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from bench.peers import Layer, activation, layer

SCALING = 2.0


@dataclass(frozen=True)
class Problem:
    """Layers with adapters, applied to m rows. All tensors follow from it, from fixed seeds."""

    shape: str
    dtype: str
    device: str
    base: str  # dense or nf4
    m: int
    rank: int  # 0: no adapter
    dropout: float = 0.0
    dora: bool = False
    projections: int = 1  # layers that share x
    adapters: int = 1  # of which each row has one, `adapter_ids`

    @property
    def size(self) -> tuple[int, int]:
        rows, cols = map(int, self.shape.split("x"))
        return rows, cols

    @property
    def layer(self) -> Layer:
        return layer(self.shape, self.dtype, self.device)

    def but(self, **changes) -> "Problem":
        return replace(self, **changes)


class Adapter(NamedTuple):
    """Float32, of values that bfloat16 has too, so that adapters of either dtype are the same ones."""

    lora_a: torch.Tensor  # [adapters, rank, in]
    lora_b: torch.Tensor  # [adapters, out, rank]
    magnitude: torch.Tensor | None  # [out]


def inputs(problem: Problem) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """X, and dY of each projection."""
    rows, cols = problem.size
    where = (problem.dtype, problem.device)
    dys = [activation(2 + i, problem.m, rows, *where) for i in range(problem.projections)]
    return activation(1, problem.m, cols, *where), dys


def adapter_ids(problem: Problem) -> torch.Tensor:
    generator = torch.Generator(problem.device).manual_seed(3)
    return torch.randint(problem.adapters, (problem.m,), generator=generator, device=problem.device)


def adapters(problem: Problem) -> list[Adapter]:
    """One for each projection, whatever m and the dropout."""
    return _adapters(problem.but(m=0, dropout=0.0))


@functools.lru_cache(maxsize=2)
def _adapters(problem: Problem) -> list[Adapter]:
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


def _weight(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    """As the layer holds it: exact where 4 bits do and the dtype can."""
    exact = problem.base == "nf4" and dtype == torch.float64
    return (problem.layer.exact if exact else problem.layer.dense).to(dtype)


def _norm(problem: Problem, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (_weight(problem, dtype) + SCALING * b[0].to(dtype) @ a[0].to(dtype)).norm(dim=1)


def _gain(problem: Problem, dtype: torch.dtype) -> torch.Tensor | None:
    if not problem.dora:
        return None
    a, b, magnitude = adapters(problem)[0]
    return magnitude.to(dtype) / _norm(problem, a, b, dtype)


@functools.lru_cache(maxsize=4)
def _base_products(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """g x W^T and (sum of g dY) W, the same for all adapters but DoRA's."""
    x, dys = inputs(problem)
    weight, gain = _weight(problem, dtype), _gain(problem, dtype)
    if gain is not None:
        weight = weight * gain[:, None]
    return x.to(dtype) @ weight.t(), sum(dy.to(dtype) for dy in dys) @ weight


def _base(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rank = problem.rank if problem.dora else 0
    return _base_products(problem.but(rank=rank, dropout=0.0, adapters=1), dtype)


def define(
    problem: Problem, masks: Sequence[torch.Tensor] | None, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ys, and the gradients of x, then of A, B (and DoRA's magnitude) of each projection."""
    y0, dx0 = _base(problem, dtype)
    if not problem.rank:
        return [y0] * problem.projections, [dx0]
    x, dys = inputs(problem)
    x, gain, ids = x.to(dtype).requires_grad_(), _gain(problem, dtype), adapter_ids(problem)
    ys, leaves = [], [x]
    for i, adapter in enumerate(adapters(problem)):
        a, b, *magnitude = own = [t.to(dtype, copy=True).requires_grad_() for t in adapter if t is not None]
        dropped = x * masks[i].to(dtype) if masks else x
        parts = [(ids == j)[:, None] * (dropped @ a[j].t() @ b[j].t()) for j in range(problem.adapters)]
        y = SCALING * sum(parts)
        y = y0 + (y if gain is None else gain * y)
        for m in magnitude:  # its gain is in y already, with no gradient
            y = y * (m / m.detach())
        ys.append(y)
        leaves += own
    grads = torch.autograd.grad(ys, leaves, [dy.to(dtype) for dy in dys])
    return [y.detach() for y in ys], [grads[0] + dx0, *grads[1:]]


@functools.lru_cache(maxsize=4)
def without_dropout(problem: Problem, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return define(problem, None, dtype)
