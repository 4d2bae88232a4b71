"""Attentions that are compared.

Each takes tensors of its own layout, and is checked against its own definition. The LSH attentions
hash for themselves and return the buckets; their results are checked on those very buckets.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import pyfast
from bench.lsh_attention import flex
from bench.lsh_attention.problem import (
    CHUNK,
    SEED,
    LSHAttention,
    default_buckets,
    define,
    define_exact_rows,
    pyfast_buckets,
)
from bench.measure.case import largest_error
from bench.measure.peer import Peer, SkippedCase, index_by_name, load_module
from pyfast import LSH_PRESETS, reference

# A function of q and v that returns the output, and the buckets if there are any.
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class LSHPeer(Peer):
    """Base class of the attentions."""

    leaves = "qv"  # the tensors that it takes, and returns gradients of
    choices = LSH_PRESETS["trax"]
    # It fills the score of a lone query's own key with a number so large that the shares of its
    # rounds are rounded off.
    fills_diagonal_score = False

    def attend(self, problem: LSHAttention) -> Attend:
        raise NotImplementedError

    def fold(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor [1, heads, n, dim] in its own layout."""
        return tensor

    def unfold(self, tensor: torch.Tensor, problem: LSHAttention) -> torch.Tensor:
        """Return its result as [heads, n, dim]."""
        return tensor[0]

    def buckets(self, problem: LSHAttention, returned: torch.Tensor | None) -> torch.Tensor:
        """Return the buckets that came with the result, as [heads, rounds, n]."""
        return returned

    def error(self, problem: LSHAttention, result: tuple) -> float:
        """Return the largest error of the output and, after a backward, of the gradients."""
        out, returned, *grads = result
        heads = problem.checked_heads
        buckets = self.buckets(problem, returned)
        exact = define(problem, buckets, self.choices, torch.float64)[: 1 + len(grads)]
        tensors = [self.unfold(t, problem)[:heads] for t in (out, *grads)]
        if self.fills_diagonal_score:
            v = problem.draw_tensor("v")[0, :heads]
            lone = (exact[0] == v).all(-1)[..., None]
            tensors = [torch.where(lone, e, t.double()) for t, e in zip(tensors, exact)]
        return largest_error(tensors, exact)


class PyFast(LSHPeer):
    name = "pyfast"

    def attend(self, problem):
        def call(q, v):
            options = {"n_hashes": problem.rounds, "chunk_length": CHUNK, "seed": SEED}
            return pyfast.lsh_attention(q, v, **options), None

        return call

    def buckets(self, problem, returned):
        return pyfast_buckets(problem)


class SDPA(LSHPeer):
    """Exact causal attention with keys of its own: what LSH attention must be ahead of."""

    name = "sdpa"
    leaves = "qkv"
    checked_rows = 64

    def attend(self, problem):
        return lambda q, k, v: (F.scaled_dot_product_attention(q, k, v, is_causal=True), None)

    def error(self, problem, result):
        heads = problem.checked_heads
        rows = torch.linspace(0, problem.m - 1, self.checked_rows, device=problem.device).long()
        q, k, v, dout = (t[0, :heads] for t in problem.draw_tensors("qkvd"))
        out, _, *grads = result
        tensors = [t[0, :heads, rows] for t in (out, *grads[:1])]
        return largest_error(tensors, define_exact_rows(q, k, v, dout, rows)[: len(tensors)])


def check_memory(problem: LSHAttention) -> None:
    """Raise SkippedCase for what does not fit into a CPU's memory, which would end the whole run.

    A peer has scores, weights and masks of all chunks, and sorted copies.
    """
    heads, dim = problem.size
    item_bytes = 4 if problem.dtype == "fp32" else 2
    need = heads * problem.m * problem.rounds * (6 * 2 * CHUNK + 8 * dim) * item_bytes
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if problem.device == "cpu" and need > 0.6 * have:
        raise SkippedCase(f"about {need / 2**30:.0f} GiB: not run")


class _Projected(NamedTuple):
    """q and v in place of LSHSelfAttention's hidden states; its projections are `_Pick`s."""

    q: torch.Tensor
    v: torch.Tensor

    @property
    def shape(self):
        return self.q.shape


class _Pick(torch.nn.Module):
    """A projection that picks q or v."""

    def __init__(self, name: str):
        super().__init__()
        self.forward = lambda projected: getattr(projected, name)


class HuggingFace(LSHPeer):
    """transformers' LSHSelfAttention without its projections."""

    name = "hf"
    choices = LSH_PRESETS["hf"]
    fills_diagonal_score = True
    module = "transformers.models.reformer.modeling_reformer"

    def attend(self, problem):
        check_memory(problem)
        heads, dim = problem.size
        config = load_module("transformers").ReformerConfig(
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
        module = load_module(self.module).LSHSelfAttention(config).to(problem.device)
        module.query_key, module.value = _Pick("q"), _Pick("v")

        def call(q, v):
            result = module(_Projected(q, v))
            return result.hidden_states, result.buckets

        return call

    def fold(self, tensor):
        return tensor.transpose(1, 2).flatten(2)

    def unfold(self, tensor, problem):
        return tensor[0].unflatten(-1, problem.size).transpose(0, 1)

    def buckets(self, problem, returned):
        return returned[0]  # numbered through all rounds, each round's in order


class Lucidrains(LSHPeer):
    """reformer_pytorch's LSHAttention, heads folded into the batch."""

    name = "lucidrains"
    module = "reformer_pytorch"
    choices = LSH_PRESETS["lucidrains"]
    fills_diagonal_score = True

    def attend(self, problem):
        check_memory(problem)
        if problem.m % (2 * CHUNK):
            raise SkippedCase(f"lengths are multiples of {2 * CHUNK}")
        options = {"bucket_size": CHUNK, "n_hashes": problem.rounds, "causal": True}
        module = load_module(self.module).LSHAttention(**options).eval()

        def call(q, v):
            out, _, buckets = module(q, v)
            return out, buckets

        return call

    def fold(self, tensor):
        return tensor[0]

    def unfold(self, tensor, problem):
        return tensor

    def buckets(self, problem, returned):
        return returned.view(problem.size[0], problem.rounds, problem.m)


class Flex(LSHPeer):
    """FlexAttention on the sorted tokens of all rounds in one row.

    Hashing, sorting and merging are torch's.
    """

    name = "flex"
    block = 128  # two chunks; FlexAttention's kernels take no smaller blocks

    def missing_reason(self, device):
        return "no backward on a CPU" if device == "cpu" else None

    def attend(self, problem):
        if problem.m % self.block:
            raise SkippedCase(f"lengths are multiples of {self.block}")
        factors = default_buckets(problem)
        heads, dim = problem.size
        shape = (1, heads, dim, problem.rounds, sum(factors) // 2)
        generator = torch.Generator().manual_seed(SEED)
        rotations = torch.randn(shape, generator=generator).to(problem.device)
        hash_tokens = torch.compile(lambda q: reference.lsh_hash_op(q, rotations, list(factors)))
        attend = flex.compile_attention()

        def call(q, v):
            buckets = hash_tokens(q.detach())
            order = buckets.argsort(dim=-1, stable=True)
            sorted_q, sorted_k, sorted_v = flex.sort_tokens(q, v, order)
            mask = flex.make_mask(order.flatten(2), self.block)
            out, lse = attend(
                sorted_q, sorted_k, sorted_v, block_mask=mask, scale=1.0, return_lse=True
            )
            return flex.merge_rounds(out, lse, v, order), buckets

        return call

    def buckets(self, problem, returned):
        return returned[0]


PEERS = index_by_name(PyFast(), SDPA(), HuggingFace(), Lucidrains(), Flex())
