"""Bucketed LSH attention, computed over all pairs of tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast._support.dtypes import sum_dtype
from pyfast.reference import lsh_options
from pyfast.reference._common import dropout_mask, dropout_threshold
from pyfast.reference._lsh_hash import inverse, lsh_buckets, lsh_rotations_op, lsh_sort_op


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
    seed: int | None = None,
    rotations: Tensor | None = None,
    buckets: Tensor | None = None,
    return_lse: bool = False,
    return_buckets: bool = False,
    **choices,
) -> Tensor | tuple[Tensor, ...]:
    """Hash, sort, and attend to what each query sees; see `lsh_attention_op`."""
    c = lsh_options.resolve(preset, k is not None, **choices)
    factors = lsh_options.factors(n_buckets, c.bucket_rule, qk.shape[2], chunk_length, rotations)
    if buckets is None:
        padded = key_padding_mask if c.pad_bucket else None
        if rotations is None:
            shape = (qk.shape[1], qk.shape[-1], n_hashes or 4, sum(factors) // 2)
            rotations = lsh_rotations_op(torch.as_tensor(seed), shape).to(qk.device)
        sides = [qk] if k is None else [qk, k.repeat_interleave(qk.shape[1] // k.shape[1], dim=1)]
        hashing = dict(n_buckets=factors, rotations=rotations, key_padding_mask=padded)
        buckets = torch.stack([lsh_buckets(side, **hashing) for side in sides])
    buckets = buckets if buckets.dim() == 5 else buckets[None]
    order, ranks = lsh_sort_op(buckets, math.prod(factors) + 1)
    options = (
        buckets if c.same_bucket else None,
        ranks if c.correct_duplicates else None,
        key_padding_mask,
    )
    seed = None if seed is None else torch.as_tensor(seed)
    scale = qk.shape[-1] ** -0.5 if c.scale is None else c.scale
    rest = (chunk_length, scale, c.key_norm, c.wrap, causal, c.attend_self, c.mask_queries)
    out, lse = lsh_attention_op(qk, k, v, order, *options, seed, dropout_p, *rest)
    results = [out, *([lse] if return_lse else [])]
    if return_buckets:
        results.append(buckets[0] if k is None else buckets)
    return tuple(results) if len(results) > 1 else out


def lsh_attention_op(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    buckets: Tensor | None,
    ranks: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    chunk_length: int,
    scale: float,
    key_norm: str,
    wrap: str,
    causal: bool,
    attend_self: bool,
    mask_queries: bool,
) -> tuple[Tensor, Tensor]:
    """Return one softmax over all that a query sees in all rounds, and its lse, [b, h, n].

    q is [b, h, n, d]. k, with heads that divide q's, is q by default. v is [b, heads that divide
    q's, n, e]. order is [s, b, h, rounds, n], as lsh_sort returns it: of the queries, and of the
    keys if they are separate (s = 2).

    In each round the sorted tokens are cut into chunks. A query sees the keys of its chunk and of
    the one before: those of its own bucket with `buckets`, no later ones if `causal`, none that
    `mask` has False. What it sees twice counts twice; with `ranks`, what it sees n times counts
    once. A query that sees no key but its own has its own value as its result, and an lse of -inf.
    """
    accumulate_dtype = sum_dtype(q)
    n = q.shape[2]
    keys, values = (
        _all_heads(t.to(accumulate_dtype), q.shape[1])
        for t in (_normalized(q if k is None else k, key_norm), v)
    )
    position = torch.arange(n, device=q.device)
    allowed = torch.ones(n, n, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed & (position[:, None] >= position)
    if not attend_self:
        allowed = allowed & (position[:, None] != position)
    allowed = allowed.expand(*q.shape[:2], n, n)
    if mask is not None:
        allowed = allowed & mask[:, None, None]
        if mask_queries:
            allowed = allowed & mask[:, None, :, None]
    times, kept = _times_seen(
        order, buckets, chunk_length, wrap, dropout_p, seed
    )  # kept: after dropout
    times, kept = times.to(accumulate_dtype) * allowed, kept.to(accumulate_dtype) * allowed
    if ranks is not None:
        kept, times = kept / times.clamp(min=1), times.clamp(max=1)
    queries, seen_values = q.to(accumulate_dtype), values
    if mask is not None:  # nothing of a masked token is used, not even times 0
        hidden = ~mask[:, None, :, None]
        keys, seen_values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
        queries = queries.masked_fill(hidden, 0) if mask_queries else queries
    scores = scale * queries @ keys.mT
    sees = times.sum(-1, keepdim=True) > 0
    lse = torch.where(times > 0, scores + times.clamp(min=1).log(), -math.inf).logsumexp(
        -1, keepdim=True
    )
    weights = torch.where(times > 0, scores - torch.where(sees, lse, 0), -math.inf).exp() * kept
    out = torch.where(sees, weights @ seen_values, values)
    return out.to(q.dtype), lse[..., 0]


def lsh_attention_backward_op(
    dout, dlse, q, k, v, out, lse, order, *rest
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the definition's gradients of q, k (empty where it is q) and v.

    The last of `rest` says which are needed; the others are empty.
    """
    *rest, needs = rest
    accumulate_dtype = sum_dtype(q)
    inputs = [
        None if t is None else t.detach().to(accumulate_dtype).requires_grad_() for t in (q, k, v)
    ]
    with torch.enable_grad():
        out, lse = lsh_attention_op(*inputs, order, *rest)
    out_grads = [
        dout.to(accumulate_dtype),
        torch.zeros_like(lse)
        if dlse is None
        else torch.where(lse.isinf(), 0, dlse.to(accumulate_dtype)),
    ]
    wanted = [t for t, need in zip(inputs, needs) if need and t is not None]
    grads = iter(torch.autograd.grad([out, lse], wanted, out_grads) if wanted else ())
    return tuple(
        next(grads).to(t.dtype) if need and t is not None else q.new_empty(0)
        for t, need in zip((q, k, v), needs)
    )


def _normalized(x: Tensor, key_norm: str) -> Tensor:
    x = x.to(sum_dtype(x))
    if key_norm == "rms":
        return x * (x.square().sum(-1, keepdim=True) + 1e-6 * x.shape[-1]).rsqrt()
    return F.normalize(x, dim=-1) if key_norm == "l2" else x


def _all_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _times_seen(
    order, buckets, chunk_length: int, wrap: str, dropout_p: float, seed
) -> tuple[Tensor, Tensor]:
    """Return how often each query sees each key, [.., n queries, n keys], and that after dropout.

    Dropout's element is row = the query's rank, counted through all batches, heads and rounds, and
    column = the key's place in the two chunks, the earlier one first.
    """
    ranks = inverse(order.long())
    rank_q, rank_k = (
        ranks[0][..., None],
        ranks[-1][..., None, :],
    )  # [batch, heads, rounds, n, 1] and [.., 1, n]
    rounds, n = order.shape[-2:]
    last = (n - 1) // chunk_length
    times = kept = 0
    for t in range(rounds):
        chunk = rank_q[:, :, t] // chunk_length
        views = [
            (t, chunk == rank_k[:, :, t] // chunk_length, chunk_length)
        ]  # round, whether seen, first column
        views.append((t, chunk - 1 == rank_k[:, :, t] // chunk_length, 0))
        before = (t - 1) % rounds if wrap == "rounds" else t
        if wrap != "none" and not (before == t and last == 0):
            views.append((before, (chunk == 0) & (rank_k[:, :, before] // chunk_length == last), 0))
        for s, seen, column in views:
            if buckets is not None:
                same = buckets[0][:, :, t, :, None] == buckets[-1][:, :, s, None]
                seen = seen & same if s == t else torch.zeros_like(seen)
            times = times + seen.int()
            keeps = 1
            if dropout_threshold(dropout_p):
                place = column + rank_k[:, :, s] % chunk_length
                keeps = _lsh_dropout(
                    rank_q[:, :, t], place, t, rounds, chunk_length, dropout_p, seed
                )
            kept = kept + seen * keeps
    return times, kept


def _lsh_dropout(rank_q, column, t: int, rounds: int, chunk_length: int, p: float, seed) -> Tensor:
    """Return a dropout mask, [batch, heads, n, n] of 0 and 1 / (1 - p)."""
    batch, heads, n, _ = rank_q.shape
    mask = dropout_mask(batch * heads * rounds * n, 2 * chunk_length, p, int(seed), rank_q.device)
    head = torch.arange(batch * heads, device=rank_q.device).view(batch, heads, 1, 1)
    return mask[(head * rounds + t) * n + rank_q, column]
