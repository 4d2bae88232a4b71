"""Cases of the reversible bench: a stack of pre-norm transformer blocks over two streams.

They run forward and backward. Gradients are defined by plain torch in float64, of the very weights
and inputs. The rate counts the products of stored activations, for all implementations.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from bench.measure.case import SEED, Case, Trial, count_buffer_sets
from bench.measure.harness import WRONG_FACTOR
from bench.measure.machine import DTYPES
from bench.measure.peer import MissingOperation, SkippedCase, count_bytes

HEAD = 64

Pairs = Sequence[tuple[nn.Module, nn.Module]]  # F and G of each block
Network = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Attention(nn.Module):
    """Function F of a block: causal attention with heads of 64."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, -1, HEAD)).transpose(1, 3)
        y = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def make_feed_forward(width: int) -> nn.Module:
    """Return G."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


class Reversible(Case):
    """A step of one example through m blocks.

    All implementations get the same blocks, and differ only in the network they make of them.
    """

    op = "reversible fwd+bwd"
    time_weight = 4

    @property
    def flops(self) -> float:
        width, tokens = self.size
        return 3.0 * self.m * (24 * tokens * width**2 + 2 * tokens**2 * width)

    @functools.cached_property
    def steps(self) -> list["Step"]:
        first = Step(self)
        count = count_buffer_sets(self.moved_bytes(first), self.device)
        return [first, *(Step(self) for _ in range(count - 1))]

    def moved_bytes(self, instance: "Step") -> int:
        """Return the bytes that must move: parameters read twice, and gradients written once."""
        return 3 * instance.held_bytes // 2

    def build(self, peer) -> Trial:
        calls = []
        for step in self.steps:
            network = peer.network(step.blocks, self.dtype)
            calls.append(functools.partial(step.run, network))
        return Trial(calls, self.moved_bytes(self.steps[0]), self.steps[0].held_bytes)

    @functools.cached_property
    def reference(self) -> list[torch.Tensor]:
        exact = Step(self, exact=True)
        exact.run(store_activations(exact.blocks))
        return exact.grads

    def limits_for(self, peer) -> list[float]:
        """Return twice the errors of the same arithmetic in plain torch.

        The first is the limit of all gradients together, the others are those of each gradient.
        """
        if peer.plain not in self._limits:
            step = self.steps[0]
            step.run(peer.plain(step.blocks))
            errors = norm_errors(step.grads, self.reference)
            self._limits[peer.plain] = [2 * error + 1e-6 for error in errors]
        return self._limits[peer.plain]

    @functools.cached_property
    def _limits(self) -> dict:
        return {}

    def limit_for(self, peer) -> float:
        return self.limits_for(peer)[0]

    def error(self, peer, result) -> float:
        """Return the error of all gradients together.

        Each alone is also compared with its own limit, as their sizes differ.
        """
        errors = norm_errors(self.steps[0].grads, self.reference)
        limits = self.limits_for(peer)
        excess = [error / limit for error, limit in zip(errors, limits, strict=True)]
        if not all(times <= WRONG_FACTOR for times in excess):
            raise SkippedCase(f"WRONG: the error of a gradient is {max(excess):.0f}x its limit")
        return errors[0]


class MemoryOnly(Reversible):
    """A case of pyfast and torch alone, measured briefly, for its memory."""

    time_weight = 1

    def build(self, peer):
        if peer.name not in ("pyfast", "torch"):
            raise MissingOperation
        return super().build(peer)


class Step:
    """Blocks as torch initializes them, two streams, and the gradients of all of these."""

    def __init__(self, problem: Reversible, exact: bool = False):
        width, tokens = problem.size

        def cast(value):
            value = value.to(problem.device, DTYPES[problem.dtype])
            return value.double() if exact else value

        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            pairs = []
            for _ in range(problem.m):
                pairs.append(nn.ModuleList([Attention(width), make_feed_forward(width)]))
            tensors = [cast(torch.randn(1, tokens, width)) for _ in range(4)]
        self.blocks = cast(nn.ModuleList(pairs))
        self.streams = [t.requires_grad_() for t in tensors[:2]]
        self.output_grads = tensors[2:]
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [*self.streams, *self.blocks.parameters()]

    @property
    def grads(self) -> list[torch.Tensor]:
        return [leaf.grad for leaf in self.leaves]

    @property
    def held_bytes(self) -> int:
        """Bytes of parameters and their gradients."""
        return 2 * count_bytes(*self.blocks.parameters())

    def run(self, network: Network) -> None:
        """Zero the gradients, then run the forward and the backward."""
        torch._foreach_zero_(self.grads)
        torch.autograd.backward(network(*self.streams), self.output_grads)


def store_activations(blocks: Pairs) -> Network:
    """Return the network of plain torch, which stores activations."""

    def network(x1, x2):
        for f, g in blocks:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return x1, x2

    return network


def norm_errors(results: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> list[float]:
    """Return norms of differences over norms: of all tensors together, then of each."""
    pairs = list(zip(results, references, strict=True))
    differences = torch.stack([(a.double() - b.double()).norm() for a, b in pairs])
    sizes = torch.stack([b.double().norm() for _, b in pairs])
    return [float(differences.norm() / sizes.norm()), *(differences / sizes).tolist()]
