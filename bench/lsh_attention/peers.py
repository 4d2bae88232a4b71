"""The attentions to compare with: each takes tensors of its own layout, and is held against its own
definition.

The LSH ones hash for themselves and say how; what they then compute is checked on those very
buckets.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import pyfast
from bench.lsh_attention import problem as lsh_problem
from bench.lsh_attention.problem import CHUNK, SEED, LSHAttention
from bench.measure.case import largest_error
from bench.measure.peer import Peer, Skip, by_name, load
from pyfast import LSH_PRESETS, reference

Attend = Callable[
    ..., tuple[torch.Tensor, torch.Tensor | None]
]  # q, v to the output, and the buckets if it has them


class LSHPeer(Peer):
    leaves = "qv"  # what it takes and gives gradients of
    choices = LSH_PRESETS["trax"]
    fills = False  # the score of a lone query's own key with a number so large that its rounds' shares are rounded off

    def attend(self, problem: LSHAttention) -> Attend:
        raise NotImplementedError

    def fold(self, tensor: torch.Tensor) -> torch.Tensor:
        """[1, heads, n, dim] in its own layout."""
        return tensor

    def unfold(self, tensor: torch.Tensor, problem: LSHAttention) -> torch.Tensor:
        """Its result as [heads, n, dim]."""
        return tensor[0]

    def buckets(self, problem: LSHAttention, found: torch.Tensor | None) -> torch.Tensor:
        """[heads, rounds, n] out of those that came with the result."""
        return found

    def error(self, problem: LSHAttention, result: tuple) -> float:
        """The largest of the output's and, after a backward, the gradients'."""
        out, buckets, *grads = result
        right = lsh_problem.define(
            problem, self.buckets(problem, buckets), self.choices, torch.float64
        )
        right = right[: 1 + len(grads)]
        found = [self.unfold(t, problem)[: problem.checked] for t in (out, *grads)]
        if self.fills:
            v = problem.tensor("v")[0, : problem.checked]
            lone = (right[0] == v).all(-1)
            found = [
                torch.where(lone[..., None], exact, t.double()) for t, exact in zip(found, right)
            ]
        return largest_error(found, right)


class PyFast(LSHPeer):
    name = "pyfast"

    def attend(self, problem):
        def call(q, v):
            return pyfast.lsh_attention(
                q, v, n_hashes=problem.rounds, chunk_length=CHUNK, seed=SEED
            ), None

        return call

    def buckets(self, problem, found):
        return lsh_problem.own_buckets(problem)


class SDPA(LSHPeer):
    """Exact causal attention with keys of its own: what LSH attention must be ahead of."""

    name = "sdpa"
    leaves = "qkv"
    rows = 64  # to check

    def attend(self, problem):
        return lambda q, k, v: (F.scaled_dot_product_attention(q, k, v, is_causal=True), None)

    def error(self, problem, result):
        heads = problem.checked
        rows = torch.linspace(0, problem.m - 1, self.rows, device=problem.device).long()
        q, k, v, dout = (t[0, :heads] for t in problem.tensors("qkvd"))
        out, _, *grads = result
        found = [t[0, :heads, rows] for t in (out, *grads[:1])]
        return largest_error(found, lsh_problem.exact_rows(q, k, v, dout, rows)[: len(found)])


def enough_memory(problem: LSHAttention) -> None:
    """On a CPU what does not fit ends the whole run: scores, weights and masks of all chunks, and sorted copies."""
    heads, dim = problem.size
    width = 4 if problem.dtype == "fp32" else 2
    need = heads * problem.m * problem.rounds * (6 * 2 * CHUNK + 8 * dim) * width
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if problem.device == "cpu" and need > 0.6 * have:
        raise Skip(f"about {need / 2**30:.0f} GiB: not run")


class _Given(NamedTuple):
    """What LSHSelfAttention takes for hidden states, with projections that pick q or v out of it."""

    q: torch.Tensor
    v: torch.Tensor

    @property
    def shape(self):
        return self.q.shape


class _Pick(torch.nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.forward = lambda given: getattr(given, name)


class HuggingFace(LSHPeer):
    """transformers' LSHSelfAttention without its projections."""

    name = "hf"
    choices = LSH_PRESETS["hf"]
    fills = True
    module = "transformers.models.reformer.modeling_reformer"

    def attend(self, problem):
        enough_memory(problem)
        heads, dim = problem.size
        config = load("transformers").ReformerConfig(
            num_attention_heads=heads,
            attention_head_size=dim,
            hidden_size=heads * dim,
            num_hashes=problem.rounds,
            lsh_attn_chunk_length=CHUNK,
            lsh_num_chunks_before=1,
            lsh_num_chunks_after=0,
            lsh_attention_probs_dropout_prob=0.0,
            max_position_embeddings=problem.m,
            is_decoder=True,
        )
        module = load(self.module).LSHSelfAttention(config).to(problem.device)
        module.query_key, module.value = _Pick("q"), _Pick("v")

        def call(q, v):
            found = module(_Given(q, v))
            return found.hidden_states, found.buckets

        return call

    def fold(self, tensor):
        return tensor.transpose(1, 2).flatten(2)

    def unfold(self, tensor, problem):
        return tensor[0].unflatten(-1, problem.size).transpose(0, 1)

    def buckets(self, problem, found):
        return found[0]  # numbered through all rounds, each round's in order


class Lucidrains(LSHPeer):
    """reformer_pytorch's LSHAttention, heads folded into the batch."""

    name = "lucidrains"
    module = "reformer_pytorch"
    choices = LSH_PRESETS["lucidrains"]
    fills = True

    def attend(self, problem):
        enough_memory(problem)
        if problem.m % (2 * CHUNK):
            raise Skip(f"lengths are multiples of {2 * CHUNK}")
        module = (
            load(self.module)
            .LSHAttention(bucket_size=CHUNK, n_hashes=problem.rounds, causal=True)
            .eval()
        )

        def call(q, v):
            out, _, buckets = module(q, v)
            return out, buckets

        return call

    def fold(self, tensor):
        return tensor[0]

    def unfold(self, tensor, problem):
        return tensor

    def buckets(self, problem, found):
        return found.view(problem.size[0], problem.rounds, problem.m)


class Flex(LSHPeer):
    """FlexAttention on the sorted tokens of all rounds in one row, with torch's hashing, sorting and merging."""

    name = "flex"
    block = 128  # two chunks: its kernels take no smaller blocks

    def missing(self, device):
        return "no backward on a CPU" if device == "cpu" else None

    def attend(self, problem):
        if problem.m % self.block:
            raise Skip(f"lengths are multiples of {self.block}")
        factors = lsh_problem.default_buckets(problem)
        heads, dim = problem.size
        shape = (1, heads, dim, problem.rounds, sum(factors) // 2)
        rotations = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(
            problem.device
        )
        hash_tokens = torch.compile(lambda q: reference.lsh_hash_op(q, rotations, list(factors)))
        attend = _flex()

        def call(q, v):
            buckets = hash_tokens(q.detach())
            order = buckets.argsort(dim=-1, stable=True)
            sorted_q, sorted_k, sorted_v = _sorted(q, v, order)
            mask = _two_diagonals(order.flatten(2), self.block)
            out, lse = attend(
                sorted_q, sorted_k, sorted_v, block_mask=mask, scale=1.0, return_lse=True
            )
            return _merged(out, lse, v, order), buckets

        return call

    def buckets(self, problem, found):
        return found[0]


@functools.cache
def _flex() -> Any:
    return torch.compile(load("torch.nn.attention.flex_attention").flex_attention, dynamic=False)


@torch.compile
def _sorted(q, v, order):
    index = order.flatten(2)[..., None].expand(-1, -1, -1, q.shape[-1])
    k = lsh_problem.normalized(q.float(), "rms").to(q.dtype)
    return q.gather(2, index), k.gather(2, index), v.gather(2, index)


@torch.compile
def _merged(out, lse, v, order):
    """The rounds' results by the share of each in the one softmax; the own value where no round has one."""
    rounds, n = order.shape[-2:]
    back = order.argsort(dim=-1) + n * torch.arange(rounds, device=order.device)[:, None]
    lse = lse.gather(2, back.flatten(2)).view(order.shape)
    out = out.gather(2, back.flatten(2)[..., None].expand_as(out)).view(*order.shape, -1)
    alone = lse.isinf().all(2, keepdim=True)
    share = lse.masked_fill(alone, 0).softmax(2).to(out.dtype)
    return torch.where(alone[:, :, 0, :, None], v, (out * share[..., None]).sum(2))


def _two_diagonals(position: torch.Tensor, block: int) -> Any:
    """A chunk sees itself and the one before, the first the last, and of these the earlier tokens."""
    length = position.shape[-1]
    blocks, chunks = length // block, length // CHUNK

    def visible(b, h, q, k):
        back = q // CHUNK - k // CHUNK
        return ((back == 0) | (back == 1) | (back == 1 - chunks)) & (
            position[b, h, k] < position[b, h, q]
        )

    rows = torch.arange(blocks, dtype=torch.int32, device=position.device)
    count = torch.full_like(rows, min(2, blocks))[None, None]
    seen, seeing = (torch.stack([rows, rows.roll(shift)], dim=-1)[None, None] for shift in (1, -1))
    return load("torch.nn.attention.flex_attention").BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=count,
        kv_indices=seen,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=count,
        q_indices=seeing,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(block, block),
        mask_mod=visible,
    )


PEERS = by_name(PyFast(), SDPA(), HuggingFace(), Lucidrains(), Flex())
