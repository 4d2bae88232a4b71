"""What the reversible bench computes: a stack of pre-norm transformer blocks over two streams, forward and backward.

The definition of its gradients is plain torch's in float64, of the very weights and inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from bench.machine import DTYPES
from bench.peers import nbytes

HEAD = 64
SEED = 0

Pairs = Sequence[tuple[nn.Module, nn.Module]]  # F and G of each block
Network = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Attention(nn.Module):
    """F: causal, over heads of 64."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, -1, HEAD)).transpose(1, 3)
        y = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Module:
    """G."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


@dataclass(frozen=True)
class Problem:
    """A step of one example. Weights and tensors follow from it, from a fixed seed."""

    shape: str  # WIDTHxTOKENS
    dtype: str
    device: str
    depth: int

    @property
    def size(self) -> tuple[int, int]:
        width, tokens = map(int, self.shape.split("x"))
        return width, tokens

    @property
    def flops(self) -> float:
        """Of the products of a step with stored activations."""
        width, tokens = self.size
        return 3.0 * self.depth * (24 * tokens * width**2 + 2 * tokens**2 * width)


class Step:
    """Blocks as torch initialises them, two streams, and what a step leaves: the gradients of all of these."""

    def __init__(self, problem: Problem, exact: bool = False):
        width, tokens = problem.size

        def cast(given):
            given = given.to(problem.device, DTYPES[problem.dtype])
            return given.double() if exact else given

        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            pairs = [nn.ModuleList([Attention(width), feed_forward(width)]) for _ in range(problem.depth)]
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


def definition(problem: Problem) -> list[torch.Tensor]:
    exact = Step(problem, exact=True)
    exact.run(plain(exact.blocks))
    return exact.grads


def errors(found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[float]:
    """Norms of differences over norms: of all tensors together, then of each."""
    wrong = torch.stack([(a.double() - b.double()).norm() for a, b in zip(found, right, strict=True)])
    size = torch.stack([b.double().norm() for b in right])
    return [float(wrong.norm() / size.norm()), *(wrong / size).tolist()]
