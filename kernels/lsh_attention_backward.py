"""LSH attention on a GPU, backward: dq, dk and dv.

It starts from the inputs, out, its lse and the sorted order; no round leaves anything else behind.

    p = exp(score - lse),   dscore = p (dropout'(dout v) - delta),   delta = dout out - dlse

Every round is two launches. In one a program owns a tile of queries and goes through the keys of
two chunks. In the other it owns keys and goes through the queries of their chunk and the next. Each
adds to its own rows in fp32, round by round: no atomics. Where queries are the keys too, all is
added to one sum. The dout of a lonely query, which sees no key, is the gradient of its value.
`reference.lsh_attention_backward_op` is the definition.
"""

import torch
import triton
import triton.language as tl

from ._dropout import dropout_keeps
from ._launch import FUSED, cdiv
from ._layout import allocate_like
from .lsh_attention import common_arguments, is_heavy, pad_width, row_layout, tile_config
from .lsh_chunks import (
    LOG2_E,
    dot_rows,
    gather_rows,
    head_pointer,
    head_rows,
    inverse_norm,
    key_share,
    load_tokens,
    load_visible_keys,
    scatter_rows,
    wrapped_round,
)

# Configuration of lsh_attention_delta_kernel.
DELTA_CONFIG = dict(BM=16, num_warps=4)


@triton.jit
def lsh_attention_delta_kernel(
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
    """Compute delta[n] = the row sums of dout * out, minus dlse; 0 for lonely queries.

    Grid: heads x tiles of BM rows.
    """
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    position = start + tl.arange(0, BM)
    inside = position < n
    dout = gather_rows(head_rows(dout_rows, head, heads), position, inside, e, E).to(tl.float32)
    out = gather_rows(head_rows(out_rows, head, heads), position, inside, e, E).to(tl.float32)
    delta = tl.sum(dout * out, axis=1)
    if dlse_ptr is not None:
        delta -= tl.load(head_pointer(dlse_ptr, head, n) + position, mask=inside, other=0.0)
    lonely = tl.load(head_pointer(lse_ptr, head, n) + position, mask=inside, other=0.0) == float(
        "-inf"
    )
    # The only gradient of a lonely query is that of its own value.
    delta = tl.where(lonely, 0.0, delta)
    tl.store(head_pointer(delta_ptr, head, n) + position, delta, mask=inside)


@triton.jit
def _add_rows(sum_rows, out_rows, position, inside, x, d: tl.constexpr, resumes, ends):
    """Add x to rows of the sum if it `resumes` one; where it `ends`, write them to out instead."""
    resumed = inside & (position >= tl.where(resumes > 0, 0, 2147483647))
    x += gather_rows(sum_rows, position, resumed, d, x.shape[1]).to(tl.float32)
    if ends:
        scatter_rows(out_rows, position, inside, x, d)
    else:
        scatter_rows(sum_rows, position, inside, x, d)


@triton.jit
def _lse_in_base_2(lse_ptr, position, inside):
    """Return lse in base 2, and 0 for a lonely query, whose scores are all -inf."""
    lse = tl.load(lse_ptr + position, mask=inside, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)


@triton.jit(do_not_specialize=["t", "resumes", "ends"])
def lsh_attention_queries_backward_kernel(
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
    """Add the gradient of the queries in round t to its sum. Grid: heads x tiles of BM queries."""
    T: tl.constexpr = q_rows[0].dtype.element_ty
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    numbers = tl.cast(n, tl.int64) * rounds
    q_rows = head_rows(q_rows, head, heads)
    k_rows = head_rows(k_rows, head, heads, k_group)
    v_rows = head_rows(v_rows, head, heads, v_group)
    dout_rows = head_rows(dout_rows, head, heads)
    order_ptr = head_pointer(order_ptr, head, numbers)
    if buckets_ptr is not None:
        buckets_ptr = head_pointer(buckets_ptr, head, numbers)
    if ranks_ptr is not None:
        ranks_ptr = head_pointer(ranks_ptr, head, numbers)
    if mask_ptr is not None:
        mask_ptr = head_pointer(mask_ptr, head // heads, n)

    queries = load_tokens(
        order_ptr, buckets_ptr, mask_ptr if MASK_QUERIES else None, t, start, n, BM
    )
    position, inside, _, _ = queries
    q = gather_rows(q_rows, position, inside, d, D)
    dout = gather_rows(dout_rows, position, inside, e, E)
    lse = _lse_in_base_2(head_pointer(lse_ptr, head, n), position, inside)
    delta = tl.load(head_pointer(delta_ptr, head, n) + position, mask=inside, other=0.0)
    dq = tl.zeros([BM, D], tl.float32)
    for column in range(0, 2 * C, BN):
        keys = load_visible_keys(
            order_ptr, buckets_ptr, mask_ptr, t, start // C, column, n, rounds, keys_at, C, WRAP, BN
        )
        k = gather_rows(k_rows, keys[0], keys[2], d, D)
        v = gather_rows(v_rows, keys[0], keys[2], e, E)
        inverse = inverse_norm(k, d, KEY_NORM)
        share = key_share(
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
        factor = inverse * (scale * LOG2_E)
        score = dot_rows(q, q_rows, queries, k, k_rows, keys, d, BD) * factor[None, :]
        score = tl.where(share > 0, score, float("-inf"))
        # A weight is at most 1, although large scores were rounded.
        weight = tl.exp2(tl.minimum(score - lse[:, None], 0.0))
        if ranks_ptr is not None:
            weight *= share
        dweight = dot_rows(dout, dout_rows, queries, v, v_rows, keys, e, BD)
        if seed_ptr is not None:
            row = (head.to(tl.int64) * rounds + t) * n + start + tl.arange(0, BM)
            keeps = dropout_keeps(seed_ptr, row, column, threshold, BN)
            dweight = tl.where(keeps, dweight * keep_scale, 0.0)
        dscore = weight * (dweight - delta[:, None])
        unit = (k.to(tl.float32) * inverse[:, None]).to(T)
        dq = tl.dot(dscore.to(T), unit, dq, input_precision="ieee")
    dq *= tl.cast(scale, tl.float32)
    sum_rows, dq_rows = head_rows(sum_rows, head, heads), head_rows(dq_rows, head, heads)
    _add_rows(sum_rows, dq_rows, position, inside, dq, d, resumes, ends)


@triton.jit(do_not_specialize=["t", "k_resumes", "k_ends", "v_resumes", "v_ends"])
def lsh_attention_keys_backward_kernel(
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
    """Add the gradients of the keys of round t, of their values, or of both, to their sums.

    There is a sum for each head of the queries. dk_rows or dv_rows is None for what is not
    computed. Grid: heads x tiles of BM keys.
    """
    T: tl.constexpr = q_rows[0].dtype.element_ty
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    chunk, last = start // C, (n - 1) // C
    numbers = tl.cast(n, tl.int64) * rounds
    q_rows = head_rows(q_rows, head, heads)
    k_rows = head_rows(k_rows, head, heads, k_group)
    v_rows = head_rows(v_rows, head, heads, v_group)
    dout_rows = head_rows(dout_rows, head, heads)
    order_ptr = head_pointer(order_ptr, head, numbers)
    if buckets_ptr is not None:
        buckets_ptr = head_pointer(buckets_ptr, head, numbers)
    if ranks_ptr is not None:
        ranks_ptr = head_pointer(ranks_ptr, head, numbers)
    if mask_ptr is not None:
        mask_ptr = head_pointer(mask_ptr, head // heads, n)
    q_mask_ptr = mask_ptr if MASK_QUERIES else None
    k_buckets_ptr = None if buckets_ptr is None else buckets_ptr + keys_at
    lse_ptr, delta_ptr = head_pointer(lse_ptr, head, n), head_pointer(delta_ptr, head, n)

    keys = load_tokens(order_ptr + keys_at, k_buckets_ptr, mask_ptr, t, start, n, BM)
    position, inside, _, _ = keys
    k = gather_rows(k_rows, position, inside, d, D)
    inverse = inverse_norm(k, d, KEY_NORM)
    if dk_rows is not None:
        v = gather_rows(v_rows, position, inside, e, E)
        dk = tl.zeros([BM, D], tl.float32)
    if dv_rows is not None:
        dv = tl.zeros([BM, E], tl.float32)
    after = (t + 1) % rounds if WRAP == "rounds" else t
    before = wrapped_round(after, rounds, last, buckets_ptr is not None, WRAP)
    after = tl.where(before == t, after, -1)
    for ahead in range(0, 2 * C, BN):
        wraps = (chunk == last) & (ahead >= C)
        q_round = tl.where(wraps, after, t)
        q_start = tl.where(wraps, -C, chunk * C) + ahead
        queries = load_tokens(order_ptr, buckets_ptr, q_mask_ptr, q_round, q_start, n, BN)
        q = gather_rows(q_rows, queries[0], queries[2], d, D)
        dout = gather_rows(dout_rows, queries[0], queries[2], e, E)
        share = key_share(
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
        factor = inverse * (scale * LOG2_E)
        score = dot_rows(k, k_rows, keys, q, q_rows, queries, d, BD) * factor[:, None]
        score = tl.where(share > 0, score, float("-inf"))
        lse = _lse_in_base_2(lse_ptr, queries[0], queries[1])
        weight = tl.exp2(tl.minimum(score - lse[None, :], 0.0))
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
            dweight = dot_rows(v, v_rows, keys, dout, dout_rows, queries, e, BD)
            if seed_ptr is not None:
                dweight = tl.where(keeps, dweight * keep_scale, 0.0)
            delta = tl.load(delta_ptr + queries[0], mask=queries[1], other=0.0)
            dscore = weight * (dweight - delta[None, :])
            dk = tl.dot(dscore.to(T), q, dk, input_precision="ieee")
    if dv_rows is not None:
        if v_ends:
            lonely = tl.load(lse_ptr + position, mask=inside, other=0.0) == float("-inf")
            dv += gather_rows(dout_rows, position, inside & lonely, e, E).to(tl.float32)
        v_sum_rows, dv_rows = head_rows(v_sum_rows, head, heads), head_rows(dv_rows, head, heads)
        _add_rows(v_sum_rows, dv_rows, position, inside, dv, e, v_resumes, v_ends)
    if dk_rows is not None:
        dk *= tl.cast(scale, tl.float32)
        if KEY_NORM != "none":
            # k is read again, by a load that differs from the first one; otherwise it would wait in
            # registers.
            k = gather_rows(k_rows, position, inside, d, D, LAST=True)
            unit = k.to(tl.float32) * inverse[:, None]
            dk = inverse[:, None] * (dk - unit * tl.sum(unit * dk, axis=1)[:, None])
        k_sum_rows, dk_rows = head_rows(k_sum_rows, head, heads), head_rows(dk_rows, head, heads)
        _add_rows(k_sum_rows, dk_rows, position, inside, dk, d, k_resumes, k_ends)


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
    """Return dq, dk and dv, laid out as q, k and v are; empty where not needed or k is None.

    `rest` is the choices of lsh_attention and, last, three booleans that say which are needed. The
    rows of dout, q, k, v and out have no gaps, but may lie anywhere; all else is contiguous.
    """
    *choices, (need_q, need_k, need_v) = rest
    rounds, shared = order.shape[3], k is None
    if q.numel() == 0:
        grads = []
        for x, need in zip((q, k, v), (need_q, need_k, need_v)):
            grads.append(allocate_like(x, x.shape[1], x.shape[3]) if need else q.new_empty(0))
        return tuple(grads)
    delta, (_, heads, n, d), e = torch.empty_like(lse), q.shape, v.shape[-1]
    dout, out = row_layout(dout), row_layout(out)
    lsh_attention_delta_kernel[_grid(q, DELTA_CONFIG)](
        dout, dlse, out, lse, delta, n, heads, e=e, E=pad_width(e), **DELTA_CONFIG, **FUSED
    )
    dq = _Gradient(q, q, (1 + shared) * rounds) if need_q else None
    dk = dq if shared else _Gradient(k, q, rounds) if need_k else None
    dv = _Gradient(v, q, rounds) if need_v else None
    arguments, constants = common_arguments(
        q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, *choices
    )
    sizes = chunk_length, max(pad_width(d), pad_width(e)), q.dtype, is_heavy(ranks, dropout_p)
    queries, keys = tile_config("queries", *sizes), tile_config("keys", *sizes)
    # Both sums are made in one pass where they fit in registers.
    passes = ((dk, dv),) if _fits_one_pass(*sizes) else ((dk, None), (None, dv))
    for t in range(rounds):
        common = (*arguments, t, dout, lse, delta)
        if need_q:
            lsh_attention_queries_backward_kernel[_grid(q, queries)](
                *common, *dq.term(), **constants, **queries
            )
        for pair in passes:
            if pair != (None, None):
                terms = [_NO_TERM if grad is None else grad.term() for grad in pair]
                lsh_attention_keys_backward_kernel[_grid(q, keys)](
                    *common, *terms[0], *terms[1], **constants, **keys
                )
    # What is not needed is a tensor of its own, since the results of an op share no memory.
    grads = dq, None if shared else dk, dv
    return tuple(q.new_empty(0) if grad is None else grad.result() for grad in grads)


def _fits_one_pass(c: int, d: int, dtype: torch.dtype, heavy: bool) -> bool:
    """Return whether a program has registers for the sums of keys and values at once."""
    if dtype == torch.float32:
        return d <= 64 and not heavy
    return d <= (64 if heavy else 128)


# The arguments of a gradient that is not needed.
_NO_TERM = None, None, 0, 0


class _Gradient:
    """The gradient of x: a sum of `terms` terms for each head of the queries."""

    def __init__(self, x: torch.Tensor, q: torch.Tensor, terms: int):
        self.x, self.terms, self.added = x, terms, 0
        # Where a group of the queries' heads shares a head of x, `result` adds up the group in
        # fp32.
        dtype = x.dtype if x.shape[1] == q.shape[1] else torch.float32
        self.out = allocate_like(x, q.shape[1], x.shape[-1], dtype)
        exact = terms == 1 or self.out.dtype == torch.float32
        self.sum = self.out if exact else torch.empty_like(self.out, dtype=torch.float32)

    def term(self) -> tuple:
        """Return a kernel's arguments to add one term: sum, out, resumes and ends."""
        self.added += 1
        resumes, ends = int(self.added > 1), int(self.added == self.terms)
        return row_layout(self.sum), row_layout(self.out), resumes, ends

    def result(self) -> torch.Tensor:
        """Return the gradient with groups of heads added up, in their order."""
        if self.out.shape == self.x.shape:
            return self.out
        _, heads, _, width = self.x.shape
        groups = self.out.unflatten(1, (heads, -1))
        sums = allocate_like(self.x, heads, width, torch.float32)
        return torch.sum(groups, 2, out=sums).to(self.x.dtype)


def _grid(q: torch.Tensor, config: dict[str, int]) -> tuple[int]:
    batch, heads, n, _ = q.shape
    return (batch * heads * cdiv(n, config["BM"]),)
