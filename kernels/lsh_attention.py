"""LSH attention on a GPU: each query's softmax over its chunk and the one before, in every round of
hashing.

Rounds are launches, one after the other. A program owns a tile of a chunk's queries, gathers them
and the keys and values of two chunks by their sorted order, and goes on with the online softmax
where the round before left it: a token is in one chunk of a round, so nobody else writes its row,
and memory does not grow with the rounds. A key's length divides its column of the scores. Tiles
divide chunks, so that a tile of keys is in one chunk; a head's programs are neighbors, so that what
they gather is in L2. Sums are in fp32; 16-bit products round the weights to the inputs' type. No
atomics: same inputs, same bits.
"""

import math

import torch
import triton
import triton.language as tl

from ._dropout import dropout_keeps, dropout_threshold
from ._launch import cdiv, next_power_of_2
from ._layout import empty

LOG2_E = tl.constexpr(1.4426950408889634)
OPTIONS = dict(enable_fp_fusion=True)  # said, because Triton 3.10 turns the default around

# ---------------------------------------------------------------- shared with the backward


@triton.jit
def at_head(ptr, head, size):
    """Where a head's `size` elements begin."""
    return ptr + head.to(tl.int64) * size


@triton.jit
def rows_of(tensor, head, heads, group=1):
    """A head's rows [n, d]: the first, and the step to the next. `tensor` is made by `strided`.

    Heads are counted through all batches; a `group` of them shares one of the tensor's.
    """
    ptr, batch_step, head_step, row_step, _ = tensor
    UNIT: tl.constexpr = tensor[4]
    first = (head // heads).to(tl.int64) * batch_step + (head % heads // group).to(
        tl.int64
    ) * head_step
    return ptr + tl.multiple_of(first, UNIT), row_step


@triton.jit
def gather(
    rows, position, inside, d: tl.constexpr, D: tl.constexpr, first=0, LAST: tl.constexpr = False
):
    """Some rows, D columns from the first; 0 where not inside. LAST: nobody reads them soon again."""
    ptr, step = rows
    column = first + tl.arange(0, D)
    mask = inside[:, None]
    if d != D:
        mask = mask & (column < d)[None, :]
    at = ptr + position.to(tl.int64)[:, None] * step + column[None, :]
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first" if LAST else "")


@triton.jit
def scatter(rows, position, inside, x, d: tl.constexpr):
    ptr, step = rows
    column = tl.arange(0, x.shape[1])
    mask = inside[:, None]
    if d != x.shape[1]:
        mask = mask & (column < d)[None, :]
    at = ptr + position.to(tl.int64)[:, None] * step + column[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def inner(a, a_rows, a_tokens, b, b_rows, b_tokens, d: tl.constexpr, BD: tl.constexpr):
    """a b^T of gathered rows; in slices of BD columns, gathered again, where they would not fit in registers."""
    if a.shape[1] <= BD:
        return tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        acc = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        for first in range(0, d, BD):
            a_slice = gather(a_rows, a_tokens[0], a_tokens[1], d, BD, first)
            b_slice = gather(b_rows, b_tokens[0], b_tokens[1], d, BD, first)
            acc = tl.dot(a_slice, tl.trans(b_slice), acc, input_precision="ieee")
        return acc


@triton.jit
def inverse_length(x, d: tl.constexpr, KEY_NORM: tl.constexpr):
    """What makes each row unit length."""
    if KEY_NORM == "none":
        return tl.full([x.shape[0]], 1.0, tl.float32)
    else:
        square = tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
        return tl.rsqrt(square + 1e-6 * d if KEY_NORM == "rms" else tl.maximum(square, 1e-24))


@triton.jit
def looks_back_on(t, rounds, last, SAME_BUCKET: tl.constexpr, WRAP: tl.constexpr):
    """The round whose last chunk the first chunk of round t sees, or -1."""
    before = (t + rounds - 1) % rounds if WRAP == "rounds" else t
    sees = (before != t) | (last > 0)
    if SAME_BUCKET:  # another round's buckets are others
        sees = sees & (before == t)
    if WRAP == "none":
        sees = sees & False
    return tl.where(sees, before, -1)


@triton.jit
def tokens(order_ptr, buckets_ptr, mask_ptr, t, start, n, SIZE: tl.constexpr):
    """Of SIZE ranks from `start` in round t: the position, if there is one, if it is not masked, and the bucket."""
    rank = start + tl.arange(0, SIZE)
    inside = rank < tl.where(t >= 0, n, 0)
    first = tl.cast(t, tl.int64) * n
    position = tl.load(order_ptr + first + rank, mask=inside, other=0)
    unmasked = inside
    if mask_ptr is not None:
        unmasked = inside & (tl.load(mask_ptr + position, mask=inside, other=0) != 0)
    bucket = tl.zeros_like(position)
    if buckets_ptr is not None:
        bucket = tl.load(buckets_ptr + first + position, mask=inside, other=0)
    return position, inside, unmasked, bucket


@triton.jit
def _times_seen(
    q_position,
    k_position,
    buckets_ptr,
    ranks_ptr,
    n,
    rounds,
    keys_at,
    Q: tl.constexpr,
    C: tl.constexpr,
    WRAP: tl.constexpr,
):
    """How often a query sees a key in all rounds, if nothing is masked."""
    SAME_BUCKET: tl.constexpr = buckets_ptr is not None
    last = (n - 1) // C
    k_ranks_ptr = ranks_ptr + keys_at
    times = tl.zeros_like(tl.expand_dims(q_position, 1 - Q) + tl.expand_dims(k_position, Q))
    before = tl.load(k_ranks_ptr + tl.cast(rounds - 1, tl.int64) * n + k_position) // C
    for t in range(rounds):
        first = tl.cast(t, tl.int64) * n
        q_chunk = tl.expand_dims(tl.load(ranks_ptr + first + q_position) // C, 1 - Q)
        k_chunk = tl.load(k_ranks_ptr + first + k_position) // C
        chunk = tl.expand_dims(k_chunk, Q)
        sees = ((q_chunk == chunk) | (q_chunk == chunk + 1)).to(tl.int32)
        if WRAP != "none":
            end = tl.where(looks_back_on(t, rounds, last, SAME_BUCKET, WRAP) >= 0, last, -1)
            wraps = tl.expand_dims(before if WRAP == "rounds" else k_chunk, Q) == end
            sees += ((q_chunk == 0) & wraps).to(tl.int32)
            before = k_chunk
        if SAME_BUCKET:
            q_bucket = tl.load(buckets_ptr + first + q_position)
            k_bucket = tl.load(buckets_ptr + keys_at + first + k_position)
            sees = tl.where(tl.expand_dims(q_bucket, 1 - Q) == tl.expand_dims(k_bucket, Q), sees, 0)
        times += sees
    return times


@triton.jit
def seen(
    queries,
    keys,
    buckets_ptr,
    ranks_ptr,
    n,
    rounds,
    keys_at,
    Q: tl.constexpr,
    C: tl.constexpr,
    WRAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ATTEND_SELF: tl.constexpr,
):
    """What a key counts for a query: 0 unseen, else 1; given ranks, a fraction of 1 in each of the
    rounds that see it.

    Queries and keys are as `tokens` gives them; Q is the queries' dimension.
    """
    q_position, _, q_unmasked, q_bucket = queries
    k_position, _, k_unmasked, k_bucket = keys
    sees = tl.expand_dims(q_unmasked, 1 - Q) & tl.expand_dims(k_unmasked, Q)
    if CAUSAL:
        sees = sees & (tl.expand_dims(q_position, 1 - Q) >= tl.expand_dims(k_position, Q))
    if not ATTEND_SELF:
        sees = sees & (tl.expand_dims(q_position, 1 - Q) != tl.expand_dims(k_position, Q))
    if buckets_ptr is not None:
        sees = sees & (tl.expand_dims(q_bucket, 1 - Q) == tl.expand_dims(k_bucket, Q))
    share = sees.to(tl.float32)
    if ranks_ptr is not None:
        times = _times_seen(
            q_position, k_position, buckets_ptr, ranks_ptr, n, rounds, keys_at, Q, C, WRAP
        )
        share /= tl.maximum(times, 1).to(tl.float32)
    return share


@triton.jit
def keys_seen(
    order_ptr,
    buckets_ptr,
    mask_ptr,
    t,
    chunk,
    column,
    n,
    rounds,
    keys_at,
    C: tl.constexpr,
    WRAP: tl.constexpr,
    BN: tl.constexpr,
):
    """The keys in columns `column`.. of the two chunks that a chunk's queries see."""
    last = (n - 1) // C
    wraps = (chunk == 0) & (column < C)
    k_round = tl.where(wraps, looks_back_on(t, rounds, last, buckets_ptr is not None, WRAP), t)
    start = tl.where(wraps, last, chunk - 1) * C + column
    k_buckets_ptr = None if buckets_ptr is None else buckets_ptr + keys_at
    return tokens(order_ptr + keys_at, k_buckets_ptr, mask_ptr, k_round, start, n, BN)


# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["t"])
def _attention_kernel(
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
    sum_rows,
    out_rows,
    lse_ptr,
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
    """Round t, from the sum [n, e] and lse [n] of the rounds before; the last one writes out.

    The keys' order, buckets and ranks are `keys_at` elements behind the queries'. Grid: heads x
    tiles of BM queries.
    """
    T: tl.constexpr = q_rows[0].dtype.element_ty
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    numbers = tl.cast(n, tl.int64) * rounds
    q_rows = rows_of(q_rows, head, heads)
    k_rows = rows_of(k_rows, head, heads, k_group)
    v_rows = rows_of(v_rows, head, heads, v_group)
    order_ptr = at_head(order_ptr, head, numbers)
    if buckets_ptr is not None:
        buckets_ptr = at_head(buckets_ptr, head, numbers)
    if ranks_ptr is not None:
        ranks_ptr = at_head(ranks_ptr, head, numbers)
    if mask_ptr is not None:
        mask_ptr = at_head(mask_ptr, head // heads, n)
    lse_ptr = at_head(lse_ptr, head, n)

    queries = tokens(order_ptr, buckets_ptr, mask_ptr if MASK_QUERIES else None, t, start, n, BM)
    position, inside, _, _ = queries
    q = gather(q_rows, position, inside, d, D)
    resumed = inside & (position >= tl.where(t > 0, 0, n))
    acc = gather(rows_of(sum_rows, head, heads), position, resumed, e, E).to(tl.float32)
    high = tl.load(lse_ptr + position, mask=resumed, other=float("-inf")) * LOG2_E
    total = tl.where(high > float("-inf"), 1.0, 0.0)
    for column in range(0, 2 * C, BN):
        keys = keys_seen(
            order_ptr, buckets_ptr, mask_ptr, t, start // C, column, n, rounds, keys_at, C, WRAP, BN
        )
        k = gather(k_rows, keys[0], keys[2], d, D)  # nothing of masked ones: they may hold anything
        v = gather(v_rows, keys[0], keys[2], e, E)
        factor = inverse_length(k, d, KEY_NORM) * (scale * LOG2_E)
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
        score = inner(q, q_rows, queries, k, k_rows, keys, d, BD) * factor[None, :]
        score = tl.where(share > 0, score, float("-inf"))
        higher = tl.maximum(high, tl.max(score, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - finite[:, None])
        if ranks_ptr is not None:
            weight *= share
        less = tl.exp2(high - finite)
        high, total = higher, total * less + tl.sum(weight, axis=1)
        if seed_ptr is not None:
            row = (head.to(tl.int64) * rounds + t) * n + start + tl.arange(0, BM)
            weight = tl.where(
                dropout_keeps(seed_ptr, row, column, threshold, BN), weight * keep_scale, 0.0
            )
        acc = tl.dot(weight.to(T), v, acc * less[:, None], input_precision="ieee")
    lonely = total == 0
    acc /= tl.where(lonely, 1.0, total)[:, None]
    tl.store(
        lse_ptr + position, (high + tl.log2(tl.where(lonely, 1.0, total))) / LOG2_E, mask=inside
    )
    if t + 1 < rounds:
        scatter(rows_of(sum_rows, head, heads), position, inside, acc, e)
    else:
        own = gather(v_rows, position, inside & lonely, e, E).to(tl.float32)
        out = tl.where(lonely[:, None], own, acc)
        scatter(rows_of(out_rows, head, heads), position, inside, out, e)


# ---------------------------------------------------------------- launchers


def tile_config(kernel: str, c: int, d: int, dtype: torch.dtype, heavy: bool) -> dict[str, int]:
    """The tiles of a kernel, "attention", "queries" or "keys", num_warps and num_stages. Derived,
    not measured.

    BM of what a program owns, BN of what it goes through, BD of what `inner` reads at once. d is
    the wider of keys and values. Dropout's random numbers and the search for duplicates are heavy:
    they take registers.
    """
    exact = dtype == torch.float32  # without tensor cores: small tiles, all in registers
    if exact:
        rows, columns, warps, width = (32 if d <= 64 else 16), 16, 4, 16
    else:
        wide = d > (64 if kernel == "keys" else 128)
        rows = (
            128
            if c % 128 == 0 and d <= (128 if kernel == "attention" else 64) and not heavy
            else 64
        )
        rows = 32 if kernel == "keys" and d > 128 else rows
        columns = 16 if d > 128 or (heavy and kernel != "attention") else 32
        warps = 8 if heavy or wide or rows == 128 else 4
        width = 64 if heavy and kernel != "attention" else 128
    divisor = c & -c  # a power of 2
    tiles = dict(BM=min(rows, divisor), BN=min(columns, divisor), BD=width)
    # 255 registers are the most there are: the compiler rather spills some to run more programs at
    # once.
    return tiles | dict(num_warps=warps, num_stages=1 if exact else 2, maxnreg=255)


def is_heavy(ranks: torch.Tensor | None, dropout_p: float) -> bool:
    return ranks is not None or dropout_threshold(dropout_p) > 0


def block(d: int) -> int:
    return max(16, next_power_of_2(d))


def strided(x: torch.Tensor) -> tuple:
    """x[b, h, n, d] as `rows_of` takes it: with its steps and a power of 2 that divides them.

    Rows are without gaps. The step between them is a constant: a model's layout has one for all
    lengths and batches.
    """
    batch, head, row = steps = [
        step if size > 1 else 0 for size, step in zip(x.shape[:3], x.stride())
    ]
    return x, batch, head, tl.constexpr(row), tl.constexpr(math.gcd(16, *steps))


def common_arguments(
    q,
    k,
    v,
    order,
    buckets,
    ranks,
    mask,
    seed,
    p,
    c,
    scale,
    key_norm,
    wrap,
    causal,
    attend_self,
    mask_queries,
) -> tuple[tuple, dict]:
    """The arguments that all kernels begin with, and their constants."""
    (heads, n, d), keys, e, threshold = (
        q.shape[1:],
        q if k is None else k,
        v.shape[-1],
        dropout_threshold(p),
    )
    # Not as bytes: Triton 3.6 lays an operand out by the narrowest load that it comes from, and by
    # half of that where dropout joins words. For bytes that is 32 columns, and a product of 16 is
    # wrong.
    mask = None if mask is None else mask.int()
    groups = heads // keys.shape[1], heads // v.shape[1]
    numbers = n, order.shape[3], heads, *groups, 0 if k is None else order[0].numel()
    dropout = 65536 / (65536 - threshold), threshold
    tensors = *map(strided, (q, keys, v)), order, buckets, ranks, mask, seed if threshold else None
    choices = dict(
        KEY_NORM=key_norm,
        WRAP=wrap,
        CAUSAL=causal,
        ATTEND_SELF=attend_self,
        MASK_QUERIES=mask_queries,
    )
    return (*tensors, *numbers, scale, *dropout), dict(
        d=d, e=e, C=c, **choices, D=block(d), E=block(e), **OPTIONS
    )


def lsh_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor,
    order: torch.Tensor,
    buckets: torch.Tensor | None,
    ranks: torch.Tensor | None,
    mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    chunk_length: int,
    *choices,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out[b, h, n, e], laid out as q is, and its lse [b, h, n]. See reference.lsh_attention_op.

    q, k and v have rows without gaps, wherever they lie; all else is contiguous.
    """
    (batch, heads, n, d), e, rounds = q.shape, v.shape[-1], order.shape[3]
    out = empty(q, heads, e)
    lse = q.new_empty(batch, heads, n, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    sums = (
        out
        if rounds == 1 or out.dtype == torch.float32
        else torch.empty_like(out, dtype=torch.float32)
    )
    heavy = is_heavy(ranks, dropout_p)
    config = tile_config("attention", chunk_length, max(block(d), block(e)), q.dtype, heavy)
    grid = (batch * heads * cdiv(n, config["BM"]),)
    arguments, constants = common_arguments(
        q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, *choices
    )
    for t in range(rounds):
        _attention_kernel[grid](
            *arguments, t, strided(sums), strided(out), lse, **constants, **config
        )
    return out, lse
