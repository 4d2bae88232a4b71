"""Chunks of LSH attention: device functions that gather sorted tokens and say who sees whom.

A round sorts the tokens by bucket and cuts the order in chunks of C. A query sees the keys of its
chunk and of the chunk before. What the first chunk of a round sees depends on WRAP: the last chunk
of the round before, cyclically ("rounds"), the last chunk of the same round ("round") or nothing
more ("none").

`order` holds the position of each rank of a round, `buckets` the bucket and `ranks` the rank of
each position. Those of the keys are `keys_at` elements behind those of the queries. A tile of
tokens is a tuple of position, inside (it exists), unmasked and bucket, as `load_tokens` returns it.
Rows are a tuple of a pointer to the first row and the step to the next.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_pointer(ptr, head, size):
    """Return the pointer to the `size` elements of a head."""
    return ptr + head.to(tl.int64) * size


@triton.jit
def head_rows(tensor, head, heads, group=1):
    """Return the rows [n, d] of a head; `tensor` is made by `lsh_attention.row_layout`.

    Heads are counted through all batches; a `group` of them shares one head of the tensor.
    """
    ptr, batch_step, head_step, row_step, _ = tensor
    UNIT: tl.constexpr = tensor[4]
    first = (head // heads).to(tl.int64) * batch_step
    first += (head % heads // group).to(tl.int64) * head_step
    return ptr + tl.multiple_of(first, UNIT), row_step


@triton.jit
def gather_rows(
    rows, position, inside, d: tl.constexpr, D: tl.constexpr, first=0, LAST: tl.constexpr = False
):
    """Return D columns from `first` of the rows at `position`, 0 where not inside.

    d is the number of columns of a row. LAST means that nobody reads the rows again soon.
    """
    ptr, step = rows
    column = first + tl.arange(0, D)
    mask = inside[:, None]
    if d != D:
        mask = mask & (column < d)[None, :]
    address = ptr + position.to(tl.int64)[:, None] * step + column[None, :]
    return tl.load(address, mask=mask, other=0.0, eviction_policy="evict_first" if LAST else "")


@triton.jit
def scatter_rows(rows, position, inside, x, d: tl.constexpr):
    """Store x, cast to the rows' type, at `position` where inside; d is the columns of a row."""
    ptr, step = rows
    column = tl.arange(0, x.shape[1])
    mask = inside[:, None]
    if d != x.shape[1]:
        mask = mask & (column < d)[None, :]
    address = ptr + position.to(tl.int64)[:, None] * step + column[None, :]
    tl.store(address, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot_rows(a, a_rows, a_tokens, b, b_rows, b_tokens, d: tl.constexpr, BD: tl.constexpr):
    """Return a b^T of gathered rows.

    Rows of more than BD columns would not fit in registers, so they are gathered again in slices.
    """
    if a.shape[1] <= BD:
        return tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        acc = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        for first in range(0, d, BD):
            a_slice = gather_rows(a_rows, a_tokens[0], a_tokens[1], d, BD, first)
            b_slice = gather_rows(b_rows, b_tokens[0], b_tokens[1], d, BD, first)
            acc = tl.dot(a_slice, tl.trans(b_slice), acc, input_precision="ieee")
        return acc


@triton.jit
def inverse_norm(x, d: tl.constexpr, KEY_NORM: tl.constexpr):
    """Return the factor that gives each row of x the norm of KEY_NORM: "rms", "l2" or "none"."""
    if KEY_NORM == "none":
        return tl.full([x.shape[0]], 1.0, tl.float32)
    else:
        square = tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
        return tl.rsqrt(square + 1e-6 * d if KEY_NORM == "rms" else tl.maximum(square, 1e-24))


@triton.jit
def wrapped_round(t, rounds, last, SAME_BUCKET: tl.constexpr, WRAP: tl.constexpr):
    """Return the round whose last chunk the first chunk of round t sees, or -1.

    `last` is the number of a round's last chunk.
    """
    before = (t + rounds - 1) % rounds if WRAP == "rounds" else t
    sees = (before != t) | (last > 0)
    # The buckets of another round are other buckets.
    if SAME_BUCKET:
        sees = sees & (before == t)
    if WRAP == "none":
        sees = sees & False
    return tl.where(sees, before, -1)


@triton.jit
def load_tokens(order_ptr, buckets_ptr, mask_ptr, t, start, n, SIZE: tl.constexpr):
    """Return the tile of the SIZE tokens with ranks from `start` in round t; none for t = -1."""
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
def _count_visits(
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
    """Return how often a query sees a key in all rounds, if nothing is masked."""
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
            end = tl.where(wrapped_round(t, rounds, last, SAME_BUCKET, WRAP) >= 0, last, -1)
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
def key_share(
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
    """Return the share with which a key counts for a query: 0 where unseen, else 1.

    With `ranks_ptr` each of the rounds that see the key has an equal fraction of 1. Queries and
    keys are tiles of tokens; Q is the dimension of the queries in the result.
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
        times = _count_visits(
            q_position, k_position, buckets_ptr, ranks_ptr, n, rounds, keys_at, Q, C, WRAP
        )
        share /= tl.maximum(times, 1).to(tl.float32)
    return share


@triton.jit
def load_visible_keys(
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
    """Return the tile of BN keys from `column` of the two chunks that a chunk's queries see."""
    last = (n - 1) // C
    wraps = (chunk == 0) & (column < C)
    k_round = tl.where(wraps, wrapped_round(t, rounds, last, buckets_ptr is not None, WRAP), t)
    start = tl.where(wraps, last, chunk - 1) * C + column
    k_buckets_ptr = None if buckets_ptr is None else buckets_ptr + keys_at
    return load_tokens(order_ptr + keys_at, k_buckets_ptr, mask_ptr, k_round, start, n, BN)
