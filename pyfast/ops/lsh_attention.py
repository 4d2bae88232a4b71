r"""Bucketed LSH attention: softmax over the keys that hash near the query, linear in the length.

    in each of r rounds: hash, sort by (bucket, position), cut into chunks; a query sees its chunk and the one before
    out_i = sum_j p_ij v_j,   p_i = softmax over all that i sees in all rounds of scale * q_i k_j,   k = q / |q|

All rounds together are one softmax over a multiset of keys. So the backward needs q, v, out, the
log-sum-exp and the permutations, and nothing of any round: 0.4 KB a token and head (bf16, d = 64, r
= 4). A query that sees no key but its own has its own value, exactly.
`pyfast/reference/lsh_options.py` has the choices in which implementations differ, and presets of
them; `pyfast/reference/_lsh_attention.py` is the specification.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from pyfast import reference
from pyfast._support import checks, dtypes, seeds
from pyfast.ops import lsh_hash as hashing
from pyfast.ops.registered import lsh_hash
from pyfast.ops.registered.lsh_attention import (
    CHUNK_LENGTHS,
    MAX_DIM,
    attention,
    attention_backward,
    shares_heads,
)
from pyfast.reference import lsh_options

# --- the ops: CPU kernels in csrc/cpu/lsh/attention.cpp, GPU kernels in kernels/lsh_attention.py ---


class _LSHAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, order, buckets, ranks, mask, seed, *rest):
        out, lse = attention(q, k, v, order, buckets, ranks, mask, seed, *rest)
        ctx.save_for_backward(q, k, v, out, lse, order, buckets, ranks, mask, seed)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *others = ctx.saved_tensors
        needs = [
            ctx.needs_input_grad[0],
            k is not None and ctx.needs_input_grad[1],
            ctx.needs_input_grad[2],
        ]
        grads = [None] * 3
        if any(needs) and (dout is not None or dlse is not None):
            dout = torch.zeros_like(out) if dout is None else dout
            found = attention_backward(dout, dlse, q, k, v, out, lse, *others, *ctx.rest, needs)
            grads = [grad if need else None for grad, need in zip(found, needs)]
        return *grads, *[None] * (len(others) + len(ctx.rest))


# --- the function ---


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    k: Tensor | None = None,
    n_hashes: int | None = None,
    chunk_length: int = 64,
    n_buckets: int | tuple[int, ...] | None = None,
    causal: bool = True,
    preset: str = "trax",
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    rotations: Tensor | None = None,
    buckets: Tensor | None = None,
    return_lse: bool = False,
    return_buckets: bool = False,
    scale: float | None = None,
    key_norm: str | None = None,
    same_bucket: bool | None = None,
    correct_duplicates: bool | None = None,
    wrap: str | None = None,
    pad_bucket: bool | None = None,
    mask_queries: bool | None = None,
    attend_self: bool | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of each token to those that hash near it. Differentiable in qk, k and v.

    Args:
        qk: [batch, heads, length, dim], queries, and made unit length the keys; dim up to 256,
        float32, bfloat16 or
            float16 (and float64, for gradcheck); autocast applies.
        v: [batch, heads, length, v_dim], or with a divisor of the heads, each then shared by a
        group of them. k: keys of their own, [batch, v's heads, length, dim], normalized and hashed
        as qk is. n_hashes: rounds; 4, or as many as `rotations` or `buckets` have. More are more
        exact and slower. chunk_length: 16 to 256, a multiple of 16. A query sees its chunk and the
        one before. n_buckets: even, or even factors; by default the preset's rule, 2 length /
        chunk_length. Above 128, "trax" and
            "paper" factor one number by themselves. The rule makes a length a constant to
            torch.compile: for many lengths, give a number.
        causal: whether a query sees no later key. preset: the choices below: "trax", "hf",
        "lucidrains" or "paper"; `pyfast.LSH_PRESETS` lists them. key_padding_mask: [batch, length],
        True: a token to be seen. dropout_p: of the attention's weights. seed: of rotations and
        dropout; by default new ones from torch's generator. rotations: directions to hash by, as
        `lsh_buckets` takes them. buckets: ids from `lsh_buckets`, or from `return_buckets`, instead
        of hashing: [batch, heads, n_hashes, length],
            with k two of these, stacked. They are of the default or the given n_buckets, and masked
            tokens have the bucket that they come with.
        return_lse: also the log-sum-exp, [batch, heads, length]: -inf where a query saw no key but
        its own. return_buckets: also the buckets. scale: of the scores. key_norm: "rms", "l2" or
        "none". same_bucket: see only keys of the own bucket. correct_duplicates: count a key seen
        in several rounds once. wrap: what a first chunk looks back on: "rounds", "round" or "none".
        pad_bucket: masked tokens have a bucket of their own. mask_queries: masked queries see
        nothing. attend_self: see the own key like any other, instead of only where there is no
        other.

    Returns:
        [batch, heads, length, v_dim] in the inputs' dtype; with return_lse, return_buckets: a
        tuple.
    """
    given = dict(
        scale=scale,
        key_norm=key_norm,
        same_bucket=same_bucket,
        correct_duplicates=correct_duplicates,
    )
    given |= dict(
        wrap=wrap, pad_bucket=pad_bucket, mask_queries=mask_queries, attend_self=attend_self
    )
    choices = lsh_options.resolve(preset, k is not None, **given)
    check_inputs(qk, k, v, key_padding_mask)
    check_options(chunk_length, causal, "dropout_p", dropout_p)
    factors = _factors(choices, qk, n_buckets, chunk_length, n_hashes, rotations)
    q = qk.to(dtypes.compute_dtype(qk))
    if (
        seed is None
    ):  # always: what draws next finds the generator the same in a replay with `buckets`
        seed = seeds.seed_tensor(q, None)
    if buckets is not None and rotations is not None:
        raise ValueError(
            "buckets and rotations are given; they must not be both: with buckets nothing is hashed"
        )
    if buckets is None:
        padding = key_padding_mask if choices.pad_bucket else None
        buckets = _hash(
            q, None if k is None else k.to(q.dtype), n_hashes, factors, seed, rotations, padding
        )
    else:
        buckets = _given_buckets(buckets, q, k, n_hashes)
    order, ranks = lsh_hash.sort(buckets, math.prod(factors) + 1)
    ids, places = (
        (buckets if choices.same_bucket else None),
        (ranks if choices.correct_duplicates else None),
    )
    out, lse = attend(
        q,
        k,
        v,
        order,
        ids,
        places,
        key_padding_mask,
        seed,
        dropout_p,
        chunk_length,
        causal,
        choices,
    )
    found = [out, *([lse] if return_lse else [])]
    if return_buckets:
        found.append(buckets[0] if k is None else buckets)
    return tuple(found) if len(found) > 1 else out


def attend(q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, causal, choices):
    """The output and its log-sum-exp, of tokens in this order in each round: what the op is given, made ready."""
    dtype = dtypes.compute_dtype(q)
    q, k, v = (None if t is None else t.to(dtype) for t in (q, k, v))
    seed = seeds.seed_tensor(q, seed) if reference.dropout_threshold(dropout_p) > 0 else None
    scale = q.shape[-1] ** -0.5 if choices.scale is None else float(choices.scale)
    args = (q, k, v, order, buckets, ranks, mask, seed, float(dropout_p), chunk_length, scale)
    args += (choices.key_norm, choices.wrap, causal, choices.attend_self, choices.mask_queries)
    leaf = any(t is not None and t.requires_grad for t in (q, k, v))
    forward_mode = forward_ad._current_level >= 0  # refused there, aloud
    return (
        _LSHAttention.apply if forward_mode or (torch.is_grad_enabled() and leaf) else attention
    )(*args)


def _hash(q, k, n_hashes, factors, seed, rotations, padding) -> Tensor:
    """[1, batch, heads, rounds, length], or with keys of their own 2 of these, from the same rotations."""
    rounds = n_hashes or (4 if rotations is None else rotations.shape[-2])
    rotations = hashing.rotations_for(q, rounds, factors, seed, rotations)
    sides = [q] if k is None else [q, k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), dim=1)]
    ids = [lsh_hash.hash_tokens(side.detach(), rotations, list(factors)) for side in sides]
    found = ids[0][None] if k is None else torch.stack(ids)
    return (
        found if padding is None else torch.where(padding[:, None, None], found, math.prod(factors))
    )


def _given_buckets(buckets, q, k, n_hashes) -> Tensor:
    checks.tensor("buckets", buckets, (torch.int32, torch.int64, torch.int16))
    checks.same_device("buckets", buckets, "qk", q.device)
    rounds = buckets.shape[-2] if buckets.dim() > 1 else 0
    expected = (*(() if k is None else (2,)), *q.shape[:2], n_hashes or max(rounds, 1), q.shape[2])
    checks.shape("buckets", buckets, expected)
    buckets = (
        buckets if buckets.dtype != torch.int64 else buckets.clamp(-1, 2**31 - 1)
    )  # what is out of range stays so
    return (buckets if k is not None else buckets[None]).int()


def _factors(choices, qk, n_buckets, chunk_length, n_hashes, rotations) -> tuple[int, ...]:
    if n_buckets is not None:
        hashing.check_n_buckets(n_buckets)
    hashing.check_rounds(n_hashes, rotations)
    length = (
        int(qk.shape[2]) if n_buckets is None else 0
    )  # a rule for each length makes it a constant of a graph
    return lsh_options.factors(n_buckets, choices.bucket_rule, length, chunk_length, rotations)


def check_inputs(q, k, v, key_padding_mask, names=("qk", "k", "v")) -> None:
    """Tensors that fit together, by these names."""
    given = [(name, t) for name, t in zip(names, (q, k, v)) if t is not None or name != "k"]
    for name, tensor in given:
        checks.tensor(name, tensor, checks.FLOATS_AND_DOUBLE)
        if tensor.dim() != 4 or not 1 <= tensor.shape[-1] <= MAX_DIM:
            allowed = f"[batch, heads, length, dim], dim 1 to {MAX_DIM}"
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {allowed}")
        checks.same_device(name, tensor, names[0], q.device)
        if not dtypes.autocasts(q.device):  # which gives all of them one
            checks.same_dtype(name, tensor, names[0], q)
    batch, heads, n, dim = q.shape
    for name, tensor in given[1:]:
        checks.shape(
            name, tensor, (batch, tensor.shape[1], n, dim if name == "k" else tensor.shape[-1])
        )
        if not shares_heads(heads, tensor.shape[1]):
            raise ValueError(
                f"{name} has {tensor.shape[1]} heads; it must have a divisor of {names[0]}'s {heads}"
            )
    if k is not None and k.shape[1] != v.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads; it must have as many as v, {v.shape[1]}")
    hashing.check_mask(key_padding_mask, q)


def check_chunk(name: str, length: int) -> None:
    """A length that the kernels have tiles for."""
    if not isinstance(length, int) or length not in CHUNK_LENGTHS:
        raise ValueError(f"{name} is {length!r}; it must be a multiple of 16, from 16 to 256")


def check_options(chunk_length: int, causal: bool, dropout_name: str, dropout: float) -> None:
    """Those that are no choice of `lsh_choices`."""
    check_chunk("chunk_length", chunk_length)
    checks.instance("causal", causal, bool)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"{dropout_name} must be a number, not {type(dropout).__name__}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{dropout_name} is {dropout!r}; it must be at least 0 and below 1")
