r"""Bucketed LSH attention: softmax over the keys that hash near the query, linear in the length.

    in each of r rounds: hash, sort by (bucket, position), cut into chunks; a query sees its chunk and the one before
    out_i = sum_j p_ij v_j,   p_i = softmax over all that i sees in all rounds of scale * q_i k_j,   k = q / |q|

All rounds together are one softmax over a multiset of keys. So the backward needs q, v, out, the log-sum-exp and the
permutations, and nothing of any round: 0.4 KB a token and head (bf16, d = 64, r = 4). A query that sees no key but its
own has its own value, exactly. `pyfast/reference/lsh_options.py` has the choices in which implementations differ, and presets of
them; `pyfast/reference/_lsh_attention.py` is the specification.
"""

import importlib
import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from pyfast import reference
from pyfast._support import checks, registry
from pyfast.kernels._layout import by_tokens, empty
from pyfast.ops import lsh_hash as hashing
from pyfast.reference import lsh_options

CHUNK_LENGTHS, MOST_DIM = range(16, 257, 16), 256

# --- the ops: CPU kernels in csrc/cpu/lsh/attention.cpp, GPU kernels in kernels/lsh_attention.py ---


def _check(q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, scale, key_norm, wrap, *_) -> None:
    """What memory safety rests on, for the paths that C++ does not check."""
    if any(t.dim() != 4 or not 1 <= t.shape[-1] <= MOST_DIM for t in (q, v)) or order.dim() != 5:
        raise ValueError(
            f"q, v, order: {_shapes(q, v, order)}; they must be [b, h, n, d], [b, h, n, e], [s, b, h, r, n]"
        )
    batch, heads, n, dim = q.shape
    for name, tensor, width in (("k", k, dim), ("v", v, v.shape[-1])):
        if tensor is not None:
            fits = _shares(heads, tensor.shape[1])
            if tuple(tensor.shape) != (batch, tensor.shape[1], n, width) or not fits or tensor.dtype != q.dtype:
                raise ValueError(f"{name}, q: {_shapes(tensor, q)}, {tensor.dtype}, {q.dtype}; they must fit")
    sides = 1 if k is None else 2
    rounds = order.shape[3]
    for name, tensor in (("order", order), ("buckets", buckets), ("ranks", ranks)):
        if tensor is not None and (
            tuple(tensor.shape) != (sides, batch, heads, rounds, n) or tensor.dtype != torch.int32
        ):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be int32 [{sides}, b, h, r, n]")
    if mask is not None and (tuple(mask.shape) != (batch, n) or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; it must be bool {[batch, n]}")
    if rounds == 0 or chunk_length not in CHUNK_LENGTHS:
        raise ValueError(f"order has {rounds} rounds and chunk_length is {chunk_length}; see lsh_attention")
    if (reference.dropout_threshold(dropout_p) > 0) and (
        seed is None or seed.dtype != torch.int64 or seed.numel() != 1
    ):
        raise ValueError(f"seed is {seed}; dropout needs an int64 tensor of one element")
    checks.one_of("key_norm", key_norm, lsh_options.KEY_NORMS)
    checks.one_of("wrap", wrap, lsh_options.WRAPS)
    found = {t.device for t in (q, k, v, order, buckets, ranks, mask, seed) if t is not None}
    if len(found) > 1:
        raise ValueError(f"the arguments are on {', '.join(sorted(map(str, found)))}; they must be on one device")


def _shares(heads: int, others: int) -> bool:
    """Whether so many heads can share the others."""
    return heads == others or (heads > 0 and others > 0 and heads % others == 0)


def _check_backward(dout, dlse, q, k, v, out, lse, order, *rest) -> None:
    _check(q, k, v, order, *rest)
    rows = q.shape[:3]
    for name, tensor, shape in (
        ("dout", dout, (*rows, v.shape[-1])),
        ("out", out, (*rows, v.shape[-1])),
        ("lse", lse, rows),
        ("dlse", dlse, rows),
    ):
        if tensor is not None:
            checks.shape(name, tensor, shape)
            checks.same_device(name, tensor, "q", q.device)


def _shapes(*tensors: Tensor) -> list[list[int]]:
    return [list(t.shape) for t in tensors]


def _attention_fake(q, k, v, order, *rest):
    _check(q, k, v, order, *rest)
    return empty(q, q.shape[1], v.shape[-1]), q.new_empty(q.shape[:3], dtype=_sum_dtype(q))


def _backward_fake(dout, dlse, q, k, v, out, lse, order, *rest):
    *rest, needs = rest
    _check_backward(dout, dlse, q, k, v, out, lse, order, *rest)
    return tuple(
        empty(t, t.shape[1], t.shape[3]) if t is not None and need else q.new_empty(0)
        for t, need in zip((q, k, v), needs)
    )


def _attention_cuda(q, k, v, *rest):
    _check(q, k, v, *rest)
    kernels = importlib.import_module("pyfast.kernels.lsh_attention")
    return kernels.lsh_attention(*map(_with_rows, (q, k, v)), *_contiguous(*rest))


def _backward_cuda(dout, dlse, q, k, v, out, lse, *rest):
    _check_backward(dout, dlse, q, k, v, out, lse, *rest[:-1])
    kernels = importlib.import_module("pyfast.kernels.lsh_attention_backward")
    dout, q, k, v, out = map(_with_rows, (dout, q, k, v, out))
    return kernels.lsh_attention_backward(dout, *_contiguous(dlse), q, k, v, out, *_contiguous(lse, *rest))


def _with_rows(x: Tensor | None) -> Tensor | None:
    """Rows without gaps, wherever they lie."""
    return x if x is None or x.stride(3) == 1 or x.shape[3] == 1 else _laid_out(x, x)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2) if by_tokens(like) else x.contiguous()


def _contiguous(*args):
    return (a.contiguous() if isinstance(a, Tensor) else a for a in args)


def _by_heads(function):
    """As an op, of a function whose tensors and results are laid out by heads."""

    def op(q, k, v, order, *rest):
        out, lse = function(*_contiguous(q, k, v, order, *rest))
        return _laid_out(out, q), lse.contiguous()

    op.lays_out = True
    return op


def _backward_by_heads(function):
    def op(dout, dlse, q, k, v, *rest):
        found = function(*_contiguous(dout, dlse, q, k, v, *rest))
        return tuple(_laid_out(grad, x) if grad.dim() == 4 else grad for grad, x in zip(found, (q, k, v)))

    op.lays_out = True
    return op


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


_attention = registry.register(
    "lsh_attention",
    fake=_attention_fake,
    cuda=_attention_cuda,
    reference=_by_heads(reference.lsh_attention_op),
    double=_by_heads(reference.lsh_attention_op),  # for gradcheck; no kernel computes in it
)
_attention_backward = registry.register(
    "lsh_attention_backward",
    fake=_backward_fake,
    cuda=_backward_cuda,
    reference=_backward_by_heads(reference.lsh_attention_backward_op),
    double=_backward_by_heads(reference.lsh_attention_backward_op),
)


class _LSHAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, order, buckets, ranks, mask, seed, *rest):
        out, lse = _attention(q, k, v, order, buckets, ranks, mask, seed, *rest)
        ctx.save_for_backward(q, k, v, out, lse, order, buckets, ranks, mask, seed)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *others = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], k is not None and ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        grads = [None] * 3
        if any(needs) and (dout is not None or dlse is not None):
            dout = torch.zeros_like(out) if dout is None else dout
            found = _attention_backward(dout, dlse, q, k, v, out, lse, *others, *ctx.rest, needs)
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
        qk: [batch, heads, length, dim], queries, and made unit length the keys; dim up to 256, float32, bfloat16 or
            float16 (and float64, for gradcheck); autocast applies.
        v: [batch, heads, length, v_dim], or with a divisor of the heads, each then shared by a group of them.
        k: keys of their own, [batch, v's heads, length, dim], normalised and hashed as qk is.
        n_hashes: rounds; 4, or as many as `rotations` or `buckets` have. More are more exact and slower.
        chunk_length: 16 to 256, a multiple of 16. A query sees its chunk and the one before.
        n_buckets: even, or even factors; by default the preset's rule, 2 length / chunk_length. Above 128, "trax" and
            "paper" factor one number by themselves. The rule makes a length a constant to torch.compile: for many
            lengths, give a number.
        causal: whether a query sees no later key.
        preset: the choices below: "trax", "hf", "lucidrains" or "paper"; `pyfast.LSH_PRESETS` lists them.
        key_padding_mask: [batch, length], True: a token to be seen.
        dropout_p: of the attention's weights.
        seed: of rotations and dropout; by default new ones from torch's generator.
        rotations: directions to hash by, as `lsh_buckets` takes them.
        buckets: ids from `lsh_buckets`, or from `return_buckets`, instead of hashing: [batch, heads, n_hashes, length],
            with k two of these, stacked. They are of the default or the given n_buckets, and masked tokens have the
            bucket that they come with.
        return_lse: also the log-sum-exp, [batch, heads, length]: -inf where a query saw no key but its own.
        return_buckets: also the buckets.
        scale: of the scores.
        key_norm: "rms", "l2" or "none".
        same_bucket: see only keys of the own bucket.
        correct_duplicates: count a key seen in several rounds once.
        wrap: what a first chunk looks back on: "rounds", "round" or "none".
        pad_bucket: masked tokens have a bucket of their own.
        mask_queries: masked queries see nothing.
        attend_self: see the own key like any other, instead of only where there is no other.

    Returns:
        [batch, heads, length, v_dim] in the inputs' dtype; with return_lse, return_buckets: a tuple.
    """
    given = dict(scale=scale, key_norm=key_norm, same_bucket=same_bucket, correct_duplicates=correct_duplicates)
    given |= dict(wrap=wrap, pad_bucket=pad_bucket, mask_queries=mask_queries, attend_self=attend_self)
    choices = lsh_options.resolve(preset, k is not None, **given)
    check_inputs(qk, k, v, key_padding_mask)
    check_options(chunk_length, causal, "dropout_p", dropout_p)
    factors = _factors(choices, qk, n_buckets, chunk_length, n_hashes, rotations)
    q = qk.to(registry.compute_dtype(qk))
    if seed is None:  # always: what draws next finds the generator the same in a replay with `buckets`
        seed = registry.seed_tensor(q, None)
    if buckets is not None and rotations is not None:
        raise ValueError("buckets and rotations are given; they must not be both: with buckets nothing is hashed")
    if buckets is None:
        padding = key_padding_mask if choices.pad_bucket else None
        buckets = _hash(q, None if k is None else k.to(q.dtype), n_hashes, factors, seed, rotations, padding)
    else:
        buckets = _given_buckets(buckets, q, k, n_hashes)
    order, ranks = hashing.sort(buckets, math.prod(factors) + 1)
    ids, places = (buckets if choices.same_bucket else None), (ranks if choices.correct_duplicates else None)
    out, lse = attend(q, k, v, order, ids, places, key_padding_mask, seed, dropout_p, chunk_length, causal, choices)
    found = [out, *([lse] if return_lse else [])]
    if return_buckets:
        found.append(buckets[0] if k is None else buckets)
    return tuple(found) if len(found) > 1 else out


def attend(q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, causal, choices):
    """The output and its log-sum-exp, of tokens in this order in each round: what the op is given, made ready."""
    dtype = registry.compute_dtype(q)
    q, k, v = (None if t is None else t.to(dtype) for t in (q, k, v))
    seed = registry.seed_tensor(q, seed) if reference.dropout_threshold(dropout_p) > 0 else None
    scale = q.shape[-1] ** -0.5 if choices.scale is None else float(choices.scale)
    args = (q, k, v, order, buckets, ranks, mask, seed, float(dropout_p), chunk_length, scale)
    args += (choices.key_norm, choices.wrap, causal, choices.attend_self, choices.mask_queries)
    leaf = any(t is not None and t.requires_grad for t in (q, k, v))
    forward_mode = forward_ad._current_level >= 0  # refused there, aloud
    return (_LSHAttention.apply if forward_mode or (torch.is_grad_enabled() and leaf) else _attention)(*args)


def _hash(q, k, n_hashes, factors, seed, rotations, padding) -> Tensor:
    """[1, batch, heads, rounds, length], or with keys of their own 2 of these, from the same rotations."""
    rounds = n_hashes or (4 if rotations is None else rotations.shape[-2])
    rotations = hashing.rotations_for(q, rounds, factors, seed, rotations)
    sides = [q] if k is None else [q, k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), dim=1)]
    ids = [hashing.hash_tokens(side.detach(), rotations, list(factors)) for side in sides]
    found = ids[0][None] if k is None else torch.stack(ids)
    return found if padding is None else torch.where(padding[:, None, None], found, math.prod(factors))


def _given_buckets(buckets, q, k, n_hashes) -> Tensor:
    checks.tensor("buckets", buckets, (torch.int32, torch.int64, torch.int16))
    checks.same_device("buckets", buckets, "qk", q.device)
    rounds = buckets.shape[-2] if buckets.dim() > 1 else 0
    expected = (*(() if k is None else (2,)), *q.shape[:2], n_hashes or max(rounds, 1), q.shape[2])
    checks.shape("buckets", buckets, expected)
    buckets = buckets if buckets.dtype != torch.int64 else buckets.clamp(-1, 2**31 - 1)  # what is out of range stays so
    return (buckets if k is not None else buckets[None]).int()


def _factors(choices, qk, n_buckets, chunk_length, n_hashes, rotations) -> tuple[int, ...]:
    if n_buckets is not None:
        hashing.check_n_buckets(n_buckets)
    hashing.check_rounds(n_hashes, rotations)
    length = int(qk.shape[2]) if n_buckets is None else 0  # a rule for each length makes it a constant of a graph
    return lsh_options.factors(n_buckets, choices.bucket_rule, length, chunk_length, rotations)


def check_inputs(q, k, v, key_padding_mask, names=("qk", "k", "v")) -> None:
    """Tensors that fit together, by these names."""
    given = [(name, t) for name, t in zip(names, (q, k, v)) if t is not None or name != "k"]
    for name, tensor in given:
        checks.tensor(name, tensor, checks.FLOATS_AND_DOUBLE)
        if tensor.dim() != 4 or not 1 <= tensor.shape[-1] <= MOST_DIM:
            allowed = f"[batch, heads, length, dim], dim 1 to {MOST_DIM}"
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {allowed}")
        checks.same_device(name, tensor, names[0], q.device)
        if not registry.autocasts(q.device):  # which gives all of them one
            checks.same_dtype(name, tensor, names[0], q)
    batch, heads, n, dim = q.shape
    for name, tensor in given[1:]:
        checks.shape(name, tensor, (batch, tensor.shape[1], n, dim if name == "k" else tensor.shape[-1]))
        if not _shares(heads, tensor.shape[1]):
            raise ValueError(f"{name} has {tensor.shape[1]} heads; it must have a divisor of {names[0]}'s {heads}")
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
