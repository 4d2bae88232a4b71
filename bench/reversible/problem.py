"""What the reversible bench computes: a stack of pre-norm transformer blocks over two streams,
forward and backward.

The definition of its gradients is plain torch's in float64, of the very weights and inputs. The
rate counts the products of stored activations, for all.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from bench.measure.case import SEED, Case, Trial, rotation
from bench.measure.machine import DTYPES
from bench.measure.peer import Lacks, Skip, nbytes

HEAD = 64

Pairs = Sequence[tuple[nn.Module, nn.Module]]  # F and G of each block
Network = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Attention(nn.Module):
    """F: causal, over heads of 64."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, -1, HEAD)).transpose(1, 3)
        y = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Module:
    """G."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


class Reversible(Case):
    """A step of one example through m blocks. Weights and tensors follow from it, from a fixed
    seed.

    All implementations are given the same blocks, and only differ in what they make of them.
    """

    op = "reversible fwd+bwd"
    weight = 4

    @property
    def flops(self) -> float:
        """Of the products of a step with stored activations."""
        width, tokens = self.size
        return 3.0 * self.m * (24 * tokens * width**2 + 2 * tokens**2 * width)

    @functools.cached_property
    def steps(self) -> list["Step"]:
        first = Step(self)
        return [first, *(Step(self) for _ in range(rotation(self.moved(first), self.device) - 1))]

    def moved(self, made: "Step") -> int:
        """Forward: parameters in. Backward: parameters in, gradients out."""
        return 3 * made.held // 2

    def build(self, peer) -> Trial:
        calls = [
            functools.partial(step.run, peer.network(step.blocks, self.dtype))
            for step in self.steps
        ]
        return Trial(calls, self.moved(self.steps[0]), self.steps[0].held)

    @functools.cached_property
    def reference(self) -> list[torch.Tensor]:
        exact = Step(self, exact=True)
        exact.run(plain(exact.blocks))
        return exact.grads

    def limits_of(self, peer) -> list[float]:
        """Twice the errors of the same arithmetic in plain torch: of all gradients, and of each."""
        if peer.plain not in self._limits:
            step = self.steps[0]
            step.run(peer.plain(step.blocks))
            self._limits[peer.plain] = [
                2 * error + 1e-6 for error in errors(step.grads, self.reference)
            ]
        return self._limits[peer.plain]

    @functools.cached_property
    def _limits(self) -> dict:
        return {}

    def limit_of(self, peer) -> float:
        return self.limits_of(peer)[0]

    def error(self, peer, result) -> float:
        """Of all gradients; each alone is held against its own limit, as their sizes differ."""
        found = errors(self.steps[0].grads, self.reference)
        excess = [error / limit for error, limit in zip(found, self.limits_of(peer), strict=True)]
        if not all(times <= 10 for times in excess):
            raise Skip(f"WRONG: the error of a gradient is {max(excess):.0f}x its limit")
        return found[0]


class Brief(Reversible):
    """Of pyfast and torch alone, once more or less: for its memory."""

    weight = 1

    def build(self, peer):
        if peer.name not in ("pyfast", "torch"):
            raise Lacks
        return super().build(peer)


class Step:
    """Blocks as torch initializes them, two streams, and what a step leaves: the gradients of all of these."""

    def __init__(self, problem: Reversible, exact: bool = False):
        width, tokens = problem.size

        def cast(given):
            given = given.to(problem.device, DTYPES[problem.dtype])
            return given.double() if exact else given

        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            pairs = [
                nn.ModuleList([Attention(width), feed_forward(width)]) for _ in range(problem.m)
            ]
            drawn = [cast(torch.randn(1, tokens, width)) for _ in range(4)]
        self.blocks = cast(nn.ModuleList(pairs))
        self.streams, self.slopes = [t.requires_grad_() for t in drawn[:2]], drawn[2:]
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [*self.streams, *self.blocks.parameters()]

    @property
    def grads(self) -> list[torch.Tensor]:
        return [leaf.grad for leaf in self.leaves]

    @property
    def held(self) -> int:
        """Bytes of parameters and their gradients."""
        return 2 * nbytes(*self.blocks.parameters())

    def run(self, network: Network) -> None:
        torch._foreach_zero_(self.grads)
        torch.autograd.backward(network(*self.streams), self.slopes)


def plain(blocks: Pairs) -> Network:
    def network(x1, x2):
        for f, g in blocks:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return x1, x2

    return network


def errors(found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[float]:
    """Norms of differences over norms: of all tensors together, then of each."""
    wrong = torch.stack(
        [(a.double() - b.double()).norm() for a, b in zip(found, right, strict=True)]
    )
    size = torch.stack([b.double().norm() for b in right])
    return [float(wrong.norm() / size.norm()), *(wrong / size).tolist()]
