"""LSH attention on a GPU: softmax of each query over its chunk and the one before, in all rounds.

`reference.lsh_attention_op` is the definition; lsh_chunks.py says which keys a query sees.

Rounds are launches, one after the other. A program owns a tile of a chunk's queries. It gathers
them and the keys and values of two chunks by their sorted order, and goes on with the online
softmax where the round before left it. A token is in one chunk of a round, so no other program
writes its row, and memory does not grow with the rounds. The norm of a key divides its column of
the scores. Tiles divide chunks, so that a tile of keys is in one chunk. The programs of a head are
neighbors, so that what they gather is in L2.

Sums are in fp32, and 16-bit products round the weights to the inputs' type. There are no atomics:
same inputs, same bits.
"""

import math

import torch
import triton
import triton.language as tl

from ._dropout import dropout_keeps, dropout_threshold
from ._launch import FUSED, cdiv, next_power_of_2
from ._layout import allocate_like
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
)

# ---------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["t"])
def lsh_attention_kernel(
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
    """Add round t to the sum [n, e] and lse [n] of the rounds before; the last round writes out.

    A lonely query, which sees no key in any round, has its own value as output and an lse of -inf.
    Grid: heads x tiles of BM queries.
    """
    T: tl.constexpr = q_rows[0].dtype.element_ty
    head, start = tl.program_id(0) // tl.cdiv(n, BM), tl.program_id(0) % tl.cdiv(n, BM) * BM
    numbers = tl.cast(n, tl.int64) * rounds
    q_rows = head_rows(q_rows, head, heads)
    k_rows = head_rows(k_rows, head, heads, k_group)
    v_rows = head_rows(v_rows, head, heads, v_group)
    order_ptr = head_pointer(order_ptr, head, numbers)
    if buckets_ptr is not None:
        buckets_ptr = head_pointer(buckets_ptr, head, numbers)
    if ranks_ptr is not None:
        ranks_ptr = head_pointer(ranks_ptr, head, numbers)
    if mask_ptr is not None:
        mask_ptr = head_pointer(mask_ptr, head // heads, n)
    lse_ptr = head_pointer(lse_ptr, head, n)

    queries = load_tokens(
        order_ptr, buckets_ptr, mask_ptr if MASK_QUERIES else None, t, start, n, BM
    )
    position, inside, _, _ = queries
    q = gather_rows(q_rows, position, inside, d, D)
    resumed = inside & (position >= tl.where(t > 0, 0, n))
    acc = gather_rows(head_rows(sum_rows, head, heads), position, resumed, e, E).to(tl.float32)
    high = tl.load(lse_ptr + position, mask=resumed, other=float("-inf")) * LOG2_E
    total = tl.where(high > float("-inf"), 1.0, 0.0)
    for column in range(0, 2 * C, BN):
        keys = load_visible_keys(
            order_ptr, buckets_ptr, mask_ptr, t, start // C, column, n, rounds, keys_at, C, WRAP, BN
        )
        # Masked keys and values may hold anything, so they are not loaded.
        k = gather_rows(k_rows, keys[0], keys[2], d, D)
        v = gather_rows(v_rows, keys[0], keys[2], e, E)
        factor = inverse_norm(k, d, KEY_NORM) * (scale * LOG2_E)
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
        score = dot_rows(q, q_rows, queries, k, k_rows, keys, d, BD) * factor[None, :]
        score = tl.where(share > 0, score, float("-inf"))
        higher = tl.maximum(high, tl.max(score, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - finite[:, None])
        if ranks_ptr is not None:
            weight *= share
        rescale = tl.exp2(high - finite)
        high, total = higher, total * rescale + tl.sum(weight, axis=1)
        if seed_ptr is not None:
            row = (head.to(tl.int64) * rounds + t) * n + start + tl.arange(0, BM)
            keeps = dropout_keeps(seed_ptr, row, column, threshold, BN)
            weight = tl.where(keeps, weight * keep_scale, 0.0)
        acc = tl.dot(weight.to(T), v, acc * rescale[:, None], input_precision="ieee")
    lonely = total == 0
    acc /= tl.where(lonely, 1.0, total)[:, None]
    lse = (high + tl.log2(tl.where(lonely, 1.0, total))) / LOG2_E
    tl.store(lse_ptr + position, lse, mask=inside)
    if t + 1 < rounds:
        scatter_rows(head_rows(sum_rows, head, heads), position, inside, acc, e)
    else:
        value = gather_rows(v_rows, position, inside & lonely, e, E).to(tl.float32)
        out = tl.where(lonely[:, None], value, acc)
        scatter_rows(head_rows(out_rows, head, heads), position, inside, out, e)


# ---------------------------------------------------------------- launchers


def tile_config(kernel: str, c: int, d: int, dtype: torch.dtype, heavy: bool) -> dict[str, int]:
    """Return the tiles and launch options of a kernel: "attention", "queries" or "keys".

    BM is the size of what a program owns, BN of what it goes through, and BD of what `dot_rows`
    reads at once. d is the wider of keys and values. Dropout's random numbers and the search for
    duplicates are heavy: they take registers. All of it is derived, not measured.
    """
    # fp32 has no tensor cores, so its tiles are small and stay in registers.
    exact = dtype == torch.float32
    if exact:
        rows, columns, warps, width = (32 if d <= 64 else 16), 16, 4, 16
    else:
        has_large_heads = d > (64 if kernel == "keys" else 128)
        max_width = 128 if kernel == "attention" else 64
        rows = 128 if c % 128 == 0 and d <= max_width and not heavy else 64
        rows = 32 if kernel == "keys" and d > 128 else rows
        columns = 16 if d > 128 or (heavy and kernel != "attention") else 32
        warps = 8 if heavy or has_large_heads or rows == 128 else 4
        width = 64 if heavy and kernel != "attention" else 128
    # The largest power of 2 that divides the chunks.
    divisor = c & -c
    tiles = dict(BM=min(rows, divisor), BN=min(columns, divisor), BD=width)
    # 255 registers are all there are. Without maxnreg the compiler rather spills some, to run
    # more programs at once.
    return tiles | dict(num_warps=warps, num_stages=1 if exact else 2, maxnreg=255)


def is_heavy(ranks: torch.Tensor | None, dropout_p: float) -> bool:
    """Return whether duplicates are searched for or dropout draws random numbers."""
    return ranks is not None or dropout_threshold(dropout_p) > 0


def pad_width(d: int) -> int:
    """Return the columns of a tile that holds rows of d elements: a power of 2, at least 16."""
    return max(16, next_power_of_2(d))


def row_layout(x: torch.Tensor) -> tuple:
    """Return x[b, h, n, d] as `head_rows` takes it: its steps, and a power of 2 that divides them.

    Rows are without gaps. The step between them is a constant of the kernel, because a model's
    layout has one for all lengths and batches.
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
    """Return the arguments that all kernels begin with, and their constants."""
    (heads, n, d), e = q.shape[1:], v.shape[-1]
    keys = q if k is None else k
    threshold = dropout_threshold(p)
    # The mask is int32, not bytes. Triton 3.6 lays an operand out by the narrowest load that it
    # comes from, and by half of that where dropout joins words. For bytes that is 32 columns, and a
    # product of 16 is wrong.
    mask = None if mask is None else mask.int()
    groups = heads // keys.shape[1], heads // v.shape[1]
    numbers = n, order.shape[3], heads, *groups, 0 if k is None else order[0].numel()
    dropout = 65536 / (65536 - threshold), threshold
    rows = [row_layout(x) for x in (q, keys, v)]
    tensors = (*rows, order, buckets, ranks, mask, seed if threshold else None)
    choices = dict(
        KEY_NORM=key_norm,
        WRAP=wrap,
        CAUSAL=causal,
        ATTEND_SELF=attend_self,
        MASK_QUERIES=mask_queries,
    )
    sizes = dict(d=d, e=e, C=c, D=pad_width(d), E=pad_width(e))
    return (*tensors, *numbers, scale, *dropout), sizes | choices | FUSED


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
    """Return out[b, h, n, e], laid out as q is, and its lse [b, h, n].

    The rows of q, k and v have no gaps, but may lie anywhere; all else is contiguous. `choices` are
    scale, key_norm, wrap, causal, attend_self and mask_queries.
    """
    (batch, heads, n, d), e, rounds = q.shape, v.shape[-1], order.shape[3]
    out = allocate_like(q, heads, e)
    lse = q.new_empty(batch, heads, n, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    # 16 bits would round the sum after each round.
    exact = rounds == 1 or out.dtype == torch.float32
    sums = out if exact else torch.empty_like(out, dtype=torch.float32)
    heavy = is_heavy(ranks, dropout_p)
    config = tile_config("attention", chunk_length, max(pad_width(d), pad_width(e)), q.dtype, heavy)
    grid = (batch * heads * cdiv(n, config["BM"]),)
    arguments, constants = common_arguments(
        q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, *choices
    )
    for t in range(rounds):
        lsh_attention_kernel[grid](
            *arguments, t, row_layout(sums), row_layout(out), lse, **constants, **config
        )
    return out, lse
