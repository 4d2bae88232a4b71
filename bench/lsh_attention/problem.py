"""Cases of the LSH attention bench: tensors, FLOPs, and the definition of output and gradients.

`pyfast.reference` defines them over all pairs of tokens. Where these are too many,
`attend_in_chunks` does. It is plain torch too, but works piece by piece over the chunks, so that
float64 is affordable at any length.
"""

import functools
import math
from dataclasses import dataclass

import torch

from bench.measure.case import BOTH, FORWARD, Case, Instance, largest_error
from bench.measure.machine import DTYPES
from bench.measure.peer import MissingOperation, SkippedCase, count_bytes
from pyfast import LSH_PRESETS, lsh_buckets, reference
from pyfast.reference import lsh_options
from pyfast.reference.lsh_options import LSHChoices

CHUNK = 64
SEED = 0
ALL_PAIRS_TOKENS = 2048  # up to which all pairs of tokens are affordable
# Results are compared in the first heads: at most 4, at most 8192 tokens in all, at least one head.
CHECKED_TOKENS, CHECKED_HEADS = 8192, 4
PIECE = 512  # chunks at a time
MAX_HASH_DIFFERENCE = 1e-3  # share of the tokens: near ties, rounded differently


@dataclass(frozen=True)
class LSHAttention(Case):
    """Causal self-attention of one example of m tokens.

    The rate counts the products of LSH attention, for all implementations.
    """

    rounds: int = 4
    only_pyfast: bool = False  # no other implementation takes a reasonable time

    op = property(lambda self: "lsh_attention" if self.step == FORWARD else "lsh_attention fwd+bwd")
    variant = property(lambda self: f"r={self.rounds}")
    parts = property(lambda self: () if self.step == FORWARD else ("lsh_attention",))

    @property
    def flops(self) -> float:
        heads, dim = self.size
        return (3.5 if self.step == BOTH else 1) * 8.0 * heads * self.m * self.rounds * CHUNK * dim

    def moved_bytes(self, instance: Instance) -> int:
        """Return the bytes that must move; a backward reads the output too."""
        output = count_bytes(*instance.output_grads) if self.step == BOTH else 0
        return super().moved_bytes(instance) + output

    @property
    def checked_heads(self) -> int:
        """The number of heads, from the first, whose results are compared."""
        return min(self.size[0], CHECKED_HEADS, max(1, CHECKED_TOKENS // self.m))

    def draw_tensor(self, name: str) -> torch.Tensor:
        """Return q, k, v, or d, the gradient of the output: [1, heads, m, dim]."""
        heads, dim = self.size
        return self.draw_normal("qkvd".index(name), 1, heads, self.m, dim)

    def draw_tensors(self, names: str) -> list[torch.Tensor]:
        return [self.draw_tensor(name) for name in names]

    def make(self, peer) -> Instance:
        if self.only_pyfast and peer.name != "pyfast":
            raise MissingOperation
        tensors = self.draw_tensors("d" + peer.leaves)
        dout, *inputs = (peer.fold(t).contiguous() for t in tensors)
        return Instance(peer.attend(self), inputs, [dout])

    def error(self, peer, result) -> float:
        return peer.error(self, result)

    @functools.cached_property
    def limit(self) -> float:
        buckets, choices = pyfast_buckets(self), LSH_PRESETS["trax"]
        plain = define(self, buckets, choices, DTYPES[self.dtype])
        exact = define(self, buckets, choices, torch.float64)
        return 2 * largest_error(plain, exact) + 1e-6


def define(
    problem: LSHAttention, buckets: torch.Tensor, choices: LSHChoices, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Compute out, dq and dv of the checked heads, whose buckets are [heads, rounds, n]."""
    tensors = problem.draw_tensors("qvd")
    q, v, dout = (t[0, : problem.checked_heads].to(dtype) for t in tensors)
    is_small = problem.m <= ALL_PAIRS_TOKENS and dtype == torch.float64
    attend = attend_all_pairs if is_small else attend_in_chunks
    heads = [attend(*head, choices=choices) for head in zip(q, v, dout, buckets)]
    return [torch.stack(results) for results in zip(*heads)]


def _scale(choices: LSHChoices, dim: int) -> float:
    return dim**-0.5 if choices.scale is None else choices.scale


def attend_all_pairs(q, v, dout, buckets, choices: LSHChoices):
    """Compute out, dq and dv of one head by the reference."""
    q, v = (t[None, None].clone().requires_grad_() for t in (q, v))
    order = buckets.argsort(dim=-1, stable=True)[None, None, None].int()
    rest = (CHUNK, _scale(choices, q.shape[-1]), choices.key_norm, choices.wrap, True, False, False)
    out, _ = reference.lsh_attention_op(q, None, v, order, None, None, None, None, 0.0, *rest)
    return [t[0, 0] for t in (out.detach(), *torch.autograd.grad(out, [q, v], dout[None, None]))]


def normalize_keys(q: torch.Tensor, key_norm: str) -> torch.Tensor:
    if key_norm == "l2":
        return torch.nn.functional.normalize(q, dim=-1)
    return q * (q.square().sum(-1, keepdim=True) + 1e-6 * q.shape[-1]).rsqrt()


@torch.no_grad()
def attend_in_chunks(q, v, dout, buckets, choices: LSHChoices):
    """Compute out, dq and dv of one head, all in the inputs' dtype.

    The chunks contribute to one softmax, round by round.
    """
    n = len(q)
    k, scale = normalize_keys(q, choices.key_norm), _scale(choices, q.shape[-1])
    order = buckets.argsort(dim=-1, stable=True)
    # The last chunk of a round is padded with n, the index of a row of zeros.
    queries = torch.nn.functional.pad(order, (0, -n % CHUNK), value=n).view(-1, CHUNK)
    keys = torch.cat([queries, queries.roll(1, dims=0)], dim=1)
    q, k, v, dout = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (q, k, v, dout))
    pieces = list(zip(queries.split(PIECE), keys.split(PIECE)))

    def scores(rows, columns):
        visible = columns[:, None] < rows[:, :, None]
        hidden = ~visible | (rows == n)[:, :, None]
        return (scale * q[rows] @ k[columns].mT).masked_fill(hidden, -math.inf)

    chunks = queries.numel() // CHUNK // len(order)
    lses = torch.cat([scores(*piece).logsumexp(-1) for piece in pieces])
    lses = lses.view(len(order), chunks * CHUNK)[:, :n]
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
        (dq_of_keys,) = torch.autograd.grad(normalize_keys(leaf, choices.key_norm), leaf, dk)
    return [out, dq + dq_of_keys, dv]


def define_exact_rows(q, k, v, dout, rows: torch.Tensor) -> list[torch.Tensor]:
    """Compute out and dq of some rows of exact causal attention, [heads, rows, dim], in float64."""
    q, k, v, dout = (t.double() for t in (q[..., rows, :], k, v, dout[..., rows, :]))
    visible = torch.arange(k.shape[-2], device=k.device) <= rows[:, None]
    p = (q.shape[-1] ** -0.5 * q @ k.mT).masked_fill(~visible, -math.inf).softmax(-1)
    out = p @ v
    ds = p * (dout @ v.mT - (out * dout).sum(-1, keepdim=True))
    return [out, q.shape[-1] ** -0.5 * ds @ k]


def pyfast_buckets(problem: LSHAttention) -> torch.Tensor:
    """Return pyfast's buckets, computed again from the same seed: [heads, rounds, n].

    They are compared with the definition's; too many differences raise SkippedCase.
    """
    (heads, dim), rounds, factors = problem.size, problem.rounds, default_buckets(problem)
    checked = problem.checked_heads
    q = problem.draw_tensor("q")
    buckets = lsh_buckets(q, n_hashes=rounds, n_buckets=factors, seed=SEED)[0, :checked]
    seed = torch.tensor(SEED, device=problem.device)
    size = (heads, dim, rounds, sum(factors) // 2)
    rotations = reference.lsh_rotations_op(seed, size)[None, :checked]
    hashed = [
        reference.lsh_hash_op(piece, rotations, list(factors))
        for piece in q[:, :checked].split(2**16, dim=2)
    ]
    share = (buckets != torch.cat(hashed, dim=-1)[0]).double().mean()
    if share > MAX_HASH_DIFFERENCE:
        raise SkippedCase(f"WRONG: {share:.1%} of the hashes")
    return buckets


def default_buckets(problem: LSHAttention) -> tuple[int, ...]:
    return lsh_options.default_buckets("trax", problem.m, CHUNK)
