"""What the LSH attention bench computes: tensors, FLOPs, and the definition of output and
gradients.

`pyfast.reference` defines it over all pairs of tokens. Where these are too many `chunked` does:
plain torch too, but piece by piece over the chunks, so that float64 is affordable at any length.
"""

import functools
import math
from dataclasses import dataclass

import torch

from bench.measure.case import BOTH, FORWARD, Case, Made, largest_error
from bench.measure.machine import DTYPES
from bench.measure.peer import Lacks, Skip, nbytes
from pyfast import LSH_PRESETS, lsh_buckets, reference
from pyfast.reference import lsh_options
from pyfast.reference.lsh_options import LSHChoices

CHUNK = 64
SEED = 0
ALL_PAIRS = 2048  # tokens up to which all pairs of them are affordable
CHECKED = (
    8192,
    4,
)  # tokens, through all heads, and heads whose results are compared; one head at least
PIECE = 512  # chunks at a time
HASHES_MAY_DIFFER = 1e-3  # of the tokens: near ties, rounded


@dataclass(frozen=True)
class LSHAttention(Case):
    """Causal self-attention of one example of m tokens. The rate counts the products of LSH attention, for all."""

    rounds: int = 4
    alone: bool = False  # only pyfast can, in reasonable time

    op = property(lambda self: "lsh_attention" if self.step == FORWARD else "lsh_attention fwd+bwd")
    variant = property(lambda self: f"r={self.rounds}")
    parts = property(lambda self: () if self.step == FORWARD else ("lsh_attention",))

    @property
    def flops(self) -> float:
        heads, dim = self.size
        return (3.5 if self.step == BOTH else 1) * 8.0 * heads * self.m * self.rounds * CHUNK * dim

    def moved(self, made: Made) -> int:
        """A backward reads the output too."""
        return super().moved(made) + (nbytes(*made.slopes) if self.step == BOTH else 0)

    @property
    def checked(self) -> int:
        """Heads, the first ones."""
        tokens, heads = CHECKED
        return min(self.size[0], heads, max(1, tokens // self.m))

    def tensor(self, name: str) -> torch.Tensor:
        """q, k, v, or d, the gradient of the output: [1, heads, m, dim]."""
        heads, dim = self.size
        return self.normal("qkvd".index(name), 1, heads, self.m, dim)

    def tensors(self, names: str) -> list[torch.Tensor]:
        return [self.tensor(name) for name in names]

    def make(self, peer) -> Made:
        if self.alone and peer.name != "pyfast":
            raise Lacks
        dout, *given = (peer.fold(t).contiguous() for t in self.tensors("d" + peer.leaves))
        return Made(peer.attend(self), given, [dout])

    def error(self, peer, result) -> float:
        return peer.error(self, result)

    @functools.cached_property
    def limit(self) -> float:
        buckets = own_buckets(self)
        plain, right = (
            define(self, buckets, LSH_PRESETS["trax"], dtype)
            for dtype in (DTYPES[self.dtype], torch.float64)
        )
        return 2 * largest_error(plain, right) + 1e-6


def define(
    problem: LSHAttention, buckets: torch.Tensor, choices: LSHChoices, dtype: torch.dtype
) -> list[torch.Tensor]:
    """out, dq and dv of the checked heads; of these are the buckets, [heads, rounds, n]."""
    q, v, dout = (t[0, : problem.checked].to(dtype) for t in problem.tensors("qvd"))
    exact = problem.m <= ALL_PAIRS and dtype == torch.float64
    one = functools.partial(_all_pairs if exact else chunked, choices=choices)
    heads = [one(*given) for given in zip(q, v, dout, buckets)]
    return [torch.stack(tensors) for tensors in zip(*heads)]


def _scale(choices: LSHChoices, dim: int) -> float:
    return dim**-0.5 if choices.scale is None else choices.scale


def _all_pairs(q, v, dout, buckets, choices: LSHChoices):
    q, v = (t[None, None].clone().requires_grad_() for t in (q, v))
    order = buckets.argsort(dim=-1, stable=True)[None, None, None].int()
    rest = (CHUNK, _scale(choices, q.shape[-1]), choices.key_norm, choices.wrap, True, False, False)
    out, _ = reference.lsh_attention_op(q, None, v, order, None, None, None, None, 0.0, *rest)
    return [t[0, 0] for t in (out.detach(), *torch.autograd.grad(out, [q, v], dout[None, None]))]


def normalized(q: torch.Tensor, key_norm: str) -> torch.Tensor:
    if key_norm == "l2":
        return torch.nn.functional.normalize(q, dim=-1)
    return q * (q.square().sum(-1, keepdim=True) + 1e-6 * q.shape[-1]).rsqrt()


@torch.no_grad()
def chunked(q, v, dout, buckets, choices: LSHChoices):
    """out, dq, dv of one head, all in the inputs' dtype: what the chunks add, round by round, to one softmax."""
    n = len(q)
    k, scale = normalized(q, choices.key_norm), _scale(choices, q.shape[-1])
    order = buckets.argsort(dim=-1, stable=True)
    own = torch.nn.functional.pad(order, (0, -n % CHUNK), value=n).view(-1, CHUNK)  # n: nobody
    seen = torch.cat([own, own.roll(1, dims=0)], dim=1)
    q, k, v, dout = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (q, k, v, dout))
    pieces = list(zip(own.split(PIECE), seen.split(PIECE)))

    def scores(rows, columns):
        visible = columns[:, None] < rows[:, :, None]
        return (scale * q[rows] @ k[columns].mT).masked_fill(
            ~visible | (rows == n)[:, :, None], -math.inf
        )

    chunks = own.numel() // CHUNK // len(order)
    lses = torch.cat([scores(*piece).logsumexp(-1) for piece in pieces]).view(
        len(order), chunks * CHUNK
    )[:, :n]
    lse = torch.zeros_like(lses).scatter(1, order, lses).logsumexp(0)
    alone = lse.isinf()
    lse = torch.cat([lse.masked_fill(alone, 0), lse.new_zeros(1)])

    out = torch.zeros_like(v)
    for rows, columns in pieces:
        p = (scores(rows, columns) - lse[rows][:, :, None]).exp()
        out.index_add_(0, rows.flatten(), (p @ v[columns]).flatten(0, 1))
    mean = (out * dout).sum(-1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, columns in pieces:
        p = (scores(rows, columns) - lse[rows][:, :, None]).exp()
        ds = scale * p * (dout[rows] @ v[columns].mT - mean[rows][:, :, None])
        dq.index_add_(0, rows.flatten(), (ds @ k[columns]).flatten(0, 1))
        dk.index_add_(0, columns.flatten(), (ds.mT @ q[rows]).flatten(0, 1))
        dv.index_add_(0, columns.flatten(), (p.mT @ dout[rows]).flatten(0, 1))

    q, v, dout, out, dq, dk, dv = (t[:n] for t in (q, v, dout, out, dq, dk, dv))
    out[alone], dv[alone] = v[alone], dv[alone] + dout[alone]
    with torch.enable_grad():
        leaf = q.clone().requires_grad_()
        (through_k,) = torch.autograd.grad(normalized(leaf, choices.key_norm), leaf, dk)
    return [out, dq + through_k, dv]


def exact_rows(q, k, v, dout, rows: torch.Tensor) -> list[torch.Tensor]:
    """out and dq of some rows of exact causal attention, [heads, rows, dim], in float64."""
    q, k, v, dout = (t.double() for t in (q[..., rows, :], k, v, dout[..., rows, :]))
    visible = torch.arange(k.shape[-2], device=k.device) <= rows[:, None]
    p = (q.shape[-1] ** -0.5 * q @ k.mT).masked_fill(~visible, -math.inf).softmax(-1)
    out = p @ v
    ds = p * (dout @ v.mT - (out * dout).sum(-1, keepdim=True))
    return [out, q.shape[-1] ** -0.5 * ds @ k]


def own_buckets(problem: LSHAttention) -> torch.Tensor:
    """pyfast's, found again from the same seed and compared with the definition's; [heads, rounds, n]."""
    (heads, dim), rounds, factors = problem.size, problem.rounds, default_buckets(problem)
    q = problem.tensor("q")
    mine = lsh_buckets(q, n_hashes=rounds, n_buckets=factors, seed=SEED)[0, : problem.checked]
    seed = torch.tensor(SEED, device=problem.device)
    rotations = reference.lsh_rotations_op(seed, (heads, dim, rounds, sum(factors) // 2))[
        None, : problem.checked
    ]
    pieces = q[:, : problem.checked].split(2**16, dim=2)
    right = torch.cat(
        [reference.lsh_hash_op(piece, rotations, list(factors)) for piece in pieces], dim=-1
    )[0]
    share = (mine != right).double().mean()
    if share > HASHES_MAY_DIFFER:
        raise Skip(f"WRONG: {share:.1%} of the hashes")
    return mine


def default_buckets(problem: LSHAttention) -> tuple[int, ...]:
    return lsh_options.default_buckets("trax", problem.m, CHUNK)
