"""LSH attention on a GPU, backward, from the inputs, out, its lse and the sorted order: nothing of
any round is kept.

    p = exp(score - lse),   dscore = p (dropout'(dout v) - delta),   delta = dout out - dlse

Every round is two launches: in one a program owns a tile of queries and goes through the keys of
two chunks, in the other it owns keys and goes through the queries of their chunk and the next. Each
adds to its own rows in fp32, round by round: no atomics. Where queries are the keys too, all goes
to one sum. A lonely query's dout is its value's gradient.
"""

import torch
import triton
import triton.language as tl

from ._dropout import dropout_keeps
from ._launch import cdiv
from ._layout import empty
from .lsh_attention import (
    LOG2_E,
    OPTIONS,
    at_head,
    block,
    common_arguments,
    gather,
    inner,
    inverse_length,
    is_heavy,
    keys_seen,
    looks_back_on,
    rows_of,
    scatter,
    seen,
    strided,
    tile_config,
    tokens,
)

DELTA = dict(BM=16, num_warps=4)


@triton.jit
def _delta_kernel(
    dout_rows,
    dlse_ptr,
    out_rows,
    lse_ptr,
    delta_ptr,
    n,
    heads,
    e: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
):
    """Grid: heads x tiles of BM rows."""
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    position = start + tl.arange(0, BM)
    inside = position < n
    dout = gather(rows_of(dout_rows, head, heads), position, inside, e, E).to(tl.float32)
    out = gather(rows_of(out_rows, head, heads), position, inside, e, E).to(tl.float32)
    delta = tl.sum(dout * out, axis=1)
    if dlse_ptr is not None:
        delta -= tl.load(at_head(dlse_ptr, head, n) + position, mask=inside, other=0.0)
    lonely = tl.load(at_head(lse_ptr, head, n) + position, mask=inside, other=0.0) == float("-inf")
    delta = tl.where(lonely, 0.0, delta)  # its slopes are those of its own value alone
    tl.store(at_head(delta_ptr, head, n) + position, delta, mask=inside)


@triton.jit
def _add(sum_rows, out_rows, position, inside, x, d: tl.constexpr, resumes, ends):
    """Adds x to rows of the sum, if there is one yet; at the end writes them out instead."""
    resumed = inside & (position >= tl.where(resumes > 0, 0, 2147483647))
    x += gather(sum_rows, position, resumed, d, x.shape[1]).to(tl.float32)
    if ends:
        scatter(out_rows, position, inside, x, d)
    else:
        scatter(sum_rows, position, inside, x, d)


@triton.jit
def _lse_in_base_2(lse_ptr, position, inside):
    """0 of a lonely query, whose scores are all -inf."""
    lse = tl.load(lse_ptr + position, mask=inside, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)


@triton.jit(do_not_specialize=["t", "resumes", "ends"])
def _queries_kernel(
    q_rows,
    k_rows,
    v_rows,
    order_ptr,
    buckets_ptr,
    ranks_ptr,
    mask_ptr,
    seed_ptr,
    n,
    rounds,
    heads,
    k_group,
    v_group,
    keys_at,
    scale,
    keep_scale,
    threshold,
    t,
    dout_rows,
    lse_ptr,
    delta_ptr,
    sum_rows,
    dq_rows,
    resumes,
    ends,
    d: tl.constexpr,
    e: tl.constexpr,
    C: tl.constexpr,
    KEY_NORM: tl.constexpr,
    WRAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ATTEND_SELF: tl.constexpr,
    MASK_QUERIES: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """The queries' gradient in round t, added to their sum. Grid: heads x tiles of BM queries."""
    T: tl.constexpr = q_rows[0].dtype.element_ty
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    numbers = tl.cast(n, tl.int64) * rounds
    q_rows = rows_of(q_rows, head, heads)
    k_rows = rows_of(k_rows, head, heads, k_group)
    v_rows = rows_of(v_rows, head, heads, v_group)
    dout_rows = rows_of(dout_rows, head, heads)
    order_ptr = at_head(order_ptr, head, numbers)
    if buckets_ptr is not None:
        buckets_ptr = at_head(buckets_ptr, head, numbers)
    if ranks_ptr is not None:
        ranks_ptr = at_head(ranks_ptr, head, numbers)
    if mask_ptr is not None:
        mask_ptr = at_head(mask_ptr, head // heads, n)

    queries = tokens(order_ptr, buckets_ptr, mask_ptr if MASK_QUERIES else None, t, start, n, BM)
    position, inside, _, _ = queries
    q = gather(q_rows, position, inside, d, D)
    dout = gather(dout_rows, position, inside, e, E)
    lse = _lse_in_base_2(at_head(lse_ptr, head, n), position, inside)
    delta = tl.load(at_head(delta_ptr, head, n) + position, mask=inside, other=0.0)
    dq = tl.zeros([BM, D], tl.float32)
    for column in range(0, 2 * C, BN):
        keys = keys_seen(
            order_ptr, buckets_ptr, mask_ptr, t, start // C, column, n, rounds, keys_at, C, WRAP, BN
        )
        k = gather(k_rows, keys[0], keys[2], d, D)
        v = gather(v_rows, keys[0], keys[2], e, E)
        inverse = inverse_length(k, d, KEY_NORM)
        share = seen(
            queries,
            keys,
            buckets_ptr,
            ranks_ptr,
            n,
            rounds,
            keys_at,
            0,
            C,
            WRAP,
            CAUSAL,
            ATTEND_SELF,
        )
        score = (
            inner(q, q_rows, queries, k, k_rows, keys, d, BD)
            * (inverse * (scale * LOG2_E))[None, :]
        )
        score = tl.where(share > 0, score, float("-inf"))
        weight = tl.exp2(
            tl.minimum(score - lse[:, None], 0.0)
        )  # at most 1, though large scores were rounded
        if ranks_ptr is not None:
            weight *= share
        dweight = inner(dout, dout_rows, queries, v, v_rows, keys, e, BD)
        if seed_ptr is not None:
            row = (head.to(tl.int64) * rounds + t) * n + start + tl.arange(0, BM)
            dweight = tl.where(
                dropout_keeps(seed_ptr, row, column, threshold, BN), dweight * keep_scale, 0.0
            )
        dscore = weight * (dweight - delta[:, None])
        unit = (k.to(tl.float32) * inverse[:, None]).to(T)
        dq = tl.dot(dscore.to(T), unit, dq, input_precision="ieee")
    dq *= tl.cast(scale, tl.float32)
    sum_rows, dq_rows = rows_of(sum_rows, head, heads), rows_of(dq_rows, head, heads)
    _add(sum_rows, dq_rows, position, inside, dq, d, resumes, ends)


@triton.jit(do_not_specialize=["t", "k_resumes", "k_ends", "v_resumes", "v_ends"])
def _keys_kernel(
    q_rows,
    k_rows,
    v_rows,
    order_ptr,
    buckets_ptr,
    ranks_ptr,
    mask_ptr,
    seed_ptr,
    n,
    rounds,
    heads,
    k_group,
    v_group,
    keys_at,
    scale,
    keep_scale,
    threshold,
    t,
    dout_rows,
    lse_ptr,
    delta_ptr,
    k_sum_rows,
    dk_rows,
    k_resumes,
    k_ends,
    v_sum_rows,
    dv_rows,
    v_resumes,
    v_ends,
    d: tl.constexpr,
    e: tl.constexpr,
    C: tl.constexpr,
    KEY_NORM: tl.constexpr,
    WRAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ATTEND_SELF: tl.constexpr,
    MASK_QUERIES: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """The gradients of the keys of round t, of their values, or of both, of each of the queries'
    heads.

    Grid: heads x tiles of BM keys.
    """
    T: tl.constexpr = q_rows[0].dtype.element_ty
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    chunk, last = start // C, (n - 1) // C
    numbers = tl.cast(n, tl.int64) * rounds
    q_rows = rows_of(q_rows, head, heads)
    k_rows = rows_of(k_rows, head, heads, k_group)
    v_rows = rows_of(v_rows, head, heads, v_group)
    dout_rows = rows_of(dout_rows, head, heads)
    order_ptr = at_head(order_ptr, head, numbers)
    if buckets_ptr is not None:
        buckets_ptr = at_head(buckets_ptr, head, numbers)
    if ranks_ptr is not None:
        ranks_ptr = at_head(ranks_ptr, head, numbers)
    if mask_ptr is not None:
        mask_ptr = at_head(mask_ptr, head // heads, n)
    q_mask_ptr = mask_ptr if MASK_QUERIES else None
    k_buckets_ptr = None if buckets_ptr is None else buckets_ptr + keys_at
    lse_ptr, delta_ptr = at_head(lse_ptr, head, n), at_head(delta_ptr, head, n)

    keys = tokens(order_ptr + keys_at, k_buckets_ptr, mask_ptr, t, start, n, BM)
    position, inside, _, _ = keys
    k = gather(k_rows, position, inside, d, D)
    inverse = inverse_length(k, d, KEY_NORM)
    if dk_rows is not None:
        v = gather(v_rows, position, inside, e, E)
        dk = tl.zeros([BM, D], tl.float32)
    if dv_rows is not None:
        dv = tl.zeros([BM, E], tl.float32)
    after = (t + 1) % rounds if WRAP == "rounds" else t
    after = tl.where(
        looks_back_on(after, rounds, last, buckets_ptr is not None, WRAP) == t, after, -1
    )
    for ahead in range(0, 2 * C, BN):
        wraps = (chunk == last) & (ahead >= C)
        q_round = tl.where(wraps, after, t)
        q_start = tl.where(wraps, -C, chunk * C) + ahead
        queries = tokens(order_ptr, buckets_ptr, q_mask_ptr, q_round, q_start, n, BN)
        q = gather(q_rows, queries[0], queries[2], d, D)
        dout = gather(dout_rows, queries[0], queries[2], e, E)
        share = seen(
            queries,
            keys,
            buckets_ptr,
            ranks_ptr,
            n,
            rounds,
            keys_at,
            1,
            C,
            WRAP,
            CAUSAL,
            ATTEND_SELF,
        )
        score = (
            inner(k, k_rows, keys, q, q_rows, queries, d, BD)
            * (inverse * (scale * LOG2_E))[:, None]
        )
        score = tl.where(share > 0, score, float("-inf"))
        weight = tl.exp2(
            tl.minimum(score - _lse_in_base_2(lse_ptr, queries[0], queries[1])[None, :], 0.0)
        )
        if ranks_ptr is not None:
            weight *= share
        if seed_ptr is not None:
            row = (head.to(tl.int64) * rounds + q_round) * n + q_start + tl.arange(0, BN)
            column = tl.where(ahead < C, C, 0) + start % C
            keeps = tl.trans(dropout_keeps(seed_ptr, row, column, threshold, BM))
        if dv_rows is not None:
            kept = weight
            if seed_ptr is not None:
                kept = tl.where(keeps, weight * keep_scale, 0.0)
            dv = tl.dot(kept.to(T), dout, dv, input_precision="ieee")
        if dk_rows is not None:
            dweight = inner(v, v_rows, keys, dout, dout_rows, queries, e, BD)
            if seed_ptr is not None:
                dweight = tl.where(keeps, dweight * keep_scale, 0.0)
            delta = tl.load(delta_ptr + queries[0], mask=queries[1], other=0.0)
            dscore = weight * (dweight - delta[None, :])
            dk = tl.dot(dscore.to(T), q, dk, input_precision="ieee")
    if dv_rows is not None:
        if v_ends:
            lonely = tl.load(lse_ptr + position, mask=inside, other=0.0) == float("-inf")
            dv += gather(dout_rows, position, inside & lonely, e, E).to(tl.float32)
        v_sum_rows, dv_rows = rows_of(v_sum_rows, head, heads), rows_of(dv_rows, head, heads)
        _add(v_sum_rows, dv_rows, position, inside, dv, e, v_resumes, v_ends)
    if dk_rows is not None:
        dk *= tl.cast(scale, tl.float32)
        if KEY_NORM != "none":
            # Read again, by a load that is not the first one's equal: else k would wait in
            # registers.
            k = gather(k_rows, position, inside, d, D, LAST=True)
            unit = k.to(tl.float32) * inverse[:, None]
            dk = inverse[:, None] * (dk - unit * tl.sum(unit * dk, axis=1)[:, None])
        k_sum_rows, dk_rows = rows_of(k_sum_rows, head, heads), rows_of(dk_rows, head, heads)
        _add(k_sum_rows, dk_rows, position, inside, dk, d, k_resumes, k_ends)


# ---------------------------------------------------------------- launchers


def lsh_attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    order: torch.Tensor,
    buckets: torch.Tensor | None,
    ranks: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    chunk_length: int,
    *rest,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, laid out as q, k and v are; empty where not needed or k is None.

    The last of `rest` says which are needed. dout, q, k, v and out have rows without gaps, wherever
    they lie; all else is contiguous.
    """
    *choices, (need_q, need_k, need_v) = rest
    rounds, shared = order.shape[3], k is None
    if q.numel() == 0:
        needed = zip((q, k, v), (need_q, need_k, need_v))
        return tuple(
            empty(t, t.shape[1], t.shape[3]) if need else q.new_empty(0) for t, need in needed
        )
    delta, (_, heads, n, d), e = torch.empty_like(lse), q.shape, v.shape[-1]
    dout, out = strided(dout), strided(out)
    _delta_kernel[_grid(q, DELTA)](
        dout, dlse, out, lse, delta, n, heads, e=e, E=block(e), **DELTA, **OPTIONS
    )
    dq = _Gradient(q, q, (1 + shared) * rounds) if need_q else None
    dk = dq if shared else _Gradient(k, q, rounds) if need_k else None
    dv = _Gradient(v, q, rounds) if need_v else None
    arguments, constants = common_arguments(
        q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, *choices
    )
    sizes = chunk_length, max(block(d), block(e)), q.dtype, is_heavy(ranks, dropout_p)
    queries, keys = tile_config("queries", *sizes), tile_config("keys", *sizes)
    # Both sums at once where they fit in registers.
    passes = ((dk, dv),) if _one_pass(*sizes) else ((dk, None), (None, dv))
    for t in range(rounds):
        common = (*arguments, t, dout, lse, delta)
        if need_q:
            _queries_kernel[_grid(q, queries)](*common, *dq.term(), **constants, **queries)
        for pair in passes:
            if pair != (None, None):
                terms = [_NONE if grad is None else grad.term() for grad in pair]
                _keys_kernel[_grid(q, keys)](*common, *terms[0], *terms[1], **constants, **keys)
    # Not needed: a tensor each, since an op's results share no memory.
    return tuple(
        q.new_empty(0) if grad is None else grad.result()
        for grad in (dq, None if shared else dk, dv)
    )


def _one_pass(c: int, d: int, dtype: torch.dtype, heavy: bool) -> bool:
    exact = dtype == torch.float32
    return d <= (128 if not heavy and not exact else 64 if not heavy or not exact else 0)


_NONE = None, None, 0, 0  # the arguments of a gradient that is not needed


class _Gradient:
    """Of x, a sum of so many terms of each of the queries' heads."""

    def __init__(self, x: torch.Tensor, q: torch.Tensor, terms: int):
        self.x, self.terms, self.added = x, terms, 0
        own_heads = x.shape[1] == q.shape[1]
        self.out = empty(x, q.shape[1], x.shape[-1], x.dtype if own_heads else torch.float32)
        exact = terms == 1 or self.out.dtype == torch.float32
        self.sum = self.out if exact else torch.empty_like(self.out, dtype=torch.float32)

    def term(self) -> tuple:
        """A kernel's arguments to add a term: sum, out, whether there is a sum yet, whether this is the last term."""
        self.added += 1
        return (
            strided(self.sum),
            strided(self.out),
            int(self.added > 1),
            int(self.added == self.terms),
        )

    def result(self) -> torch.Tensor:
        """Groups of heads added up, in their order."""
        if self.out.shape == self.x.shape:
            return self.out
        _, heads, _, width = self.x.shape
        groups = self.out.unflatten(1, (heads, -1))
        return torch.sum(groups, 2, out=empty(self.x, heads, width, torch.float32)).to(self.x.dtype)


def _grid(q: torch.Tensor, config: dict[str, int]) -> tuple[int]:
    batch, heads, n, _ = q.shape
    return (batch * heads * cdiv(n, config["BM"]),)
