r"""Bucketed LSH attention: softmax over the keys that hash near the query, linear in the length.

    in each of r rounds: hash, sort by (bucket, position), cut into chunks;
    a query sees its chunk and the one before
    out_i = sum_j p_ij v_j,   k = q / |q|
    p_i   = softmax over all that i sees in all rounds of scale * q_i k_j

All rounds together are one softmax over a multiset of keys. So the backward needs q, v, out, the
log-sum-exp and the permutations, and nothing of any round: 0.4 KB for a token of a head (bf16,
d = 64, r = 4). A query that sees no key but its own returns its own value, exactly.

Implementations differ in some choices. `pyfast/reference/lsh_options.py` lists these choices, and
presets of them. `pyfast/reference/_lsh_attention.py` is the specification.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfast import reference
from pyfast._support import checks, dtypes, seeds
from pyfast.ops import lsh_hash
from pyfast.ops.registered import lsh_attention as registered
from pyfast.ops.registered.lsh_attention import CHUNK_LENGTHS, MAX_DIM, shares_heads
from pyfast.ops.registered.lsh_hash import hash_tokens, sort
from pyfast.reference import lsh_options

# --- checks ---


def check_inputs(q, k, v, key_padding_mask, names=("qk", "k", "v")) -> None:
    """Raise unless the tensors, which errors call by these names, fit together."""
    tensors = {names[0]: q, names[1]: k, names[2]: v}
    if k is None:
        del tensors[names[1]]
    for name, tensor in tensors.items():
        checks.tensor(name, tensor, checks.FLOATS_AND_DOUBLE)
        if tensor.dim() != 4 or not 1 <= tensor.shape[-1] <= MAX_DIM:
            allowed = f"[batch, heads, length, dim], dim 1 to {MAX_DIM}"
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {allowed}")
        checks.same_device(name, tensor, names[0], q.device)
        if not dtypes.autocasts(q.device):  # autocast gives all of them one dtype
            checks.same_dtype(name, tensor, names[0], q)
    batch, heads, n, dim = q.shape
    for name, tensor in list(tensors.items())[1:]:
        width = dim if name == "k" else tensor.shape[-1]
        checks.shape(name, tensor, (batch, tensor.shape[1], n, width))
        if not shares_heads(heads, tensor.shape[1]):
            raise ValueError(
                f"{name} has {tensor.shape[1]} heads; "
                f"it must have a divisor of {names[0]}'s {heads}"
            )
    if k is not None and k.shape[1] != v.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads; it must have as many as v, {v.shape[1]}")
    lsh_hash.check_mask(key_padding_mask, q)


def check_chunk(name: str, length: int) -> None:
    """Raise unless the kernels have tiles for chunks of this length."""
    if not isinstance(length, int) or length not in CHUNK_LENGTHS:
        raise ValueError(f"{name} is {length!r}; it must be a multiple of 16, from 16 to 256")


def check_options(chunk_length: int, causal: bool, dropout_name: str, dropout: float) -> None:
    """Raise unless the options that no preset holds are valid."""
    check_chunk("chunk_length", chunk_length)
    checks.instance("causal", causal, bool)
    checks.probability(dropout_name, dropout)


# --- the autograd Function ---


class _LSHAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, order, buckets, ranks, mask, seed, *rest):
        out, lse = registered.attention(q, k, v, order, buckets, ranks, mask, seed, *rest)
        ctx.save_for_backward(q, k, v, out, lse, order, buckets, ranks, mask, seed)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *others = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        needs[1] = needs[1] and k is not None
        grads = [None] * 3
        if any(needs) and (dout is not None or dlse is not None):
            dout = torch.zeros_like(out) if dout is None else dout
            results = registered.attention_backward(
                dout, dlse, q, k, v, out, lse, *others, *ctx.rest, needs
            )
            grads = [grad if need else None for grad, need in zip(results, needs)]
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
    """Attend to the tokens that hash near each query. Differentiable in qk, k and v.

    Args:
        qk: [batch, heads, length, dim], dim up to 256, float32, bfloat16 or float16 (and float64,
            for gradcheck): the queries, and, made unit length, the keys. Autocast applies.
        v: [batch, v_heads, length, v_dim]. v_heads is heads or a divisor of it; each of its heads
            then serves a group of the queries' heads.
        k: [batch, v_heads, length, dim]: separate keys, normalized and hashed as qk is. Default:
            the keys are qk.
        n_hashes: Rounds of hashing. More are more exact and slower. Default: 4, or as many as
            `rotations` or `buckets` have.
        chunk_length: 16 to 256, a multiple of 16. A query sees its chunk and the one before.
        n_buckets: An even number, or even factors. Above 128, "trax" and "paper" factor a number
            themselves. Default: the preset's rule, 2 length / chunk_length. The rule makes a
            length a constant to torch.compile: for many lengths, pass a number.
        causal: Whether a query sees no later key.
        preset: The choices below, as an implementation makes them: "trax", "hf", "lucidrains" or
            "paper". `pyfast.LSH_PRESETS` lists them.
        key_padding_mask: [batch, length], True for tokens that are seen. Default: all are.
        dropout_p: The probability that a weight of the attention is dropped.
        seed: The seed of rotations and dropout. Default: a new one from torch's generator.
        rotations: Directions to hash by, as `lsh_buckets` takes them. Default: drawn from `seed`.
        buckets: Bucket ids from `lsh_buckets` or `return_buckets`, instead of hashing: [batch,
            heads, n_hashes, length], with k two of these, stacked. They are below n_buckets, or
            its default. Masked tokens have the bucket that they come with.
        return_lse: Whether to return the log-sum-exp, too.
        return_buckets: Whether to return the buckets, too.
        scale: The factor of the scores. Default: the preset's, as of all choices that follow.
        key_norm: How keys are made unit length: "rms", "l2" or "none".
        same_bucket: Whether a query sees only keys of its own bucket.
        correct_duplicates: Whether a key that is seen in several rounds counts once.
        wrap: What the first chunk of a round looks back on: "rounds", "round" or "none".
        pad_bucket: Whether masked tokens have a bucket of their own.
        mask_queries: Whether masked queries see nothing.
        attend_self: Whether a query sees its own key like any other; otherwise only if it sees no
            other. Default: True with separate keys.

    Returns:
        out, [batch, heads, length, v_dim] in the inputs' dtype. With `return_lse` or
        `return_buckets` a tuple: out, then lse, [batch, heads, length], which is -inf where a
        query saw no key but its own, then the buckets.

    Example:
        >>> import torch, pyfast
        >>> qk, v = torch.randn(1, 4, 256, 32), torch.randn(1, 4, 256, 32)
        >>> out, lse = pyfast.lsh_attention(qk, v, n_hashes=2, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 4, 256, 32]), torch.Size([1, 4, 256]))
    """
    choices = lsh_options.resolve(
        preset,
        k is not None,
        scale=scale,
        key_norm=key_norm,
        same_bucket=same_bucket,
        correct_duplicates=correct_duplicates,
        wrap=wrap,
        pad_bucket=pad_bucket,
        mask_queries=mask_queries,
        attend_self=attend_self,
    )
    check_inputs(qk, k, v, key_padding_mask)
    check_options(chunk_length, causal, "dropout_p", dropout_p)
    factors = _factors(choices, qk, n_buckets, chunk_length, n_hashes, rotations)
    q = qk.to(dtypes.compute_dtype(qk))
    if seed is None:
        # Drawn with `buckets`, too: whatever draws next finds the generator the same in a replay.
        seed = seeds.seed_tensor(q, None)
    if buckets is None:
        keys = None if k is None else k.to(q.dtype)
        padding = key_padding_mask if choices.pad_bucket else None
        buckets = _hash(q, keys, n_hashes, factors, seed, rotations, padding)
    else:
        buckets = _checked_buckets(buckets, q, k, n_hashes, rotations)
    order, ranks = sort(buckets, math.prod(factors) + 1)
    ids = buckets if choices.same_bucket else None
    ranks = ranks if choices.correct_duplicates else None
    options = key_padding_mask, seed, dropout_p, chunk_length, causal, choices
    out, lse = attend(q, k, v, order, ids, ranks, *options)
    results = [out, *([lse] if return_lse else [])]
    if return_buckets:
        results.append(buckets[0] if k is None else buckets)
    return tuple(results) if len(results) > 1 else out


def attend(q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, causal, choices):
    """Return the output and its log-sum-exp for tokens that are in this order in each round."""
    dtype = dtypes.compute_dtype(q)
    q, k, v = (None if tensor is None else tensor.to(dtype) for tensor in (q, k, v))
    seed = seeds.seed_tensor(q, seed) if reference.dropout_threshold(dropout_p) > 0 else None
    scale = q.shape[-1] ** -0.5 if choices.scale is None else float(choices.scale)
    args = (q, k, v, order, buckets, ranks, mask, seed, float(dropout_p), chunk_length, scale)
    args += (choices.key_norm, choices.wrap, causal, choices.attend_self, choices.mask_queries)
    if dtypes.needs_graph(q, k, v):
        return _LSHAttention.apply(*args)
    return registered.attention(*args)


def _hash(q, k, n_hashes, factors, seed, rotations, padding) -> Tensor:
    """Return buckets, [1 or with k 2, batch, heads, rounds, length], by equal rotations."""
    rounds = n_hashes or (4 if rotations is None else rotations.shape[-2])
    rotations = lsh_hash.rotations_for(q, rounds, factors, seed, rotations)
    sides = [q]
    if k is not None:
        sides.append(k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), dim=1))
    ids = [hash_tokens(side.detach(), rotations, list(factors)) for side in sides]
    buckets = ids[0][None] if k is None else torch.stack(ids)
    if padding is None:
        return buckets
    return torch.where(padding[:, None, None], buckets, math.prod(factors))


def _checked_buckets(buckets, q, k, n_hashes, rotations) -> Tensor:
    """Return the caller's buckets as int32, with k's in the first dimension, if they fit."""
    if rotations is not None:
        raise ValueError(
            "buckets and rotations are given; they must not be both: with buckets nothing is hashed"
        )
    checks.tensor("buckets", buckets, (torch.int32, torch.int64, torch.int16))
    checks.same_device("buckets", buckets, "qk", q.device)
    rounds = buckets.shape[-2] if buckets.dim() > 1 else 0
    expected = (*(() if k is None else (2,)), *q.shape[:2], n_hashes or max(rounds, 1), q.shape[2])
    checks.shape("buckets", buckets, expected)
    if buckets.dtype == torch.int64:
        buckets = buckets.clamp(-1, 2**31 - 1)  # so that ids out of range stay out of range
    return (buckets if k is not None else buckets[None]).int()


def _factors(choices, qk, n_buckets, chunk_length, n_hashes, rotations) -> tuple[int, ...]:
    if n_buckets is not None:
        lsh_hash.check_n_buckets(n_buckets)
    lsh_hash.check_rounds(n_hashes, rotations)
    # Read only if the rule needs it, because that makes the length a constant of a compiled graph.
    length = int(qk.shape[2]) if n_buckets is None else 0
    return lsh_options.factors(n_buckets, choices.bucket_rule, length, chunk_length, rotations)
