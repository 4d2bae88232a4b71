"""LSH attention's registered ops: checks, fakes, launches.

CPU kernels are in csrc/cpu/lsh/attention.cpp, GPU kernels in kernels/lsh_attention.py and
kernels/lsh_attention_backward.py. Results are laid out as q is: by heads, or by tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyfast import reference
from pyfast._support import checks, registry
from pyfast._support.dtypes import sum_dtype
from pyfast.kernels._layout import allocate_like, is_token_major
from pyfast.reference import lsh_options

CHUNK_LENGTHS, MAX_DIM = range(16, 257, 16), 256

# --- checks: what memory safety rests on, where C++ does not check it ---


def _check_attention(
    q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, scale, key_norm, wrap, *_
) -> None:
    if any(t.dim() != 4 or not 1 <= t.shape[-1] <= MAX_DIM for t in (q, v)) or order.dim() != 5:
        raise ValueError(
            f"q, v, order: {_shapes(q, v, order)}; "
            "they must be [b, h, n, d], [b, h, n, e], [s, b, h, r, n]"
        )
    batch, heads, n, dim = q.shape
    for name, tensor, width in (("k", k, dim), ("v", v, v.shape[-1])):
        if tensor is not None:
            fits = shares_heads(heads, tensor.shape[1])
            if (
                tuple(tensor.shape) != (batch, tensor.shape[1], n, width)
                or not fits
                or tensor.dtype != q.dtype
            ):
                raise ValueError(
                    f"{name}, q: {_shapes(tensor, q)}, {tensor.dtype}, {q.dtype}; they must fit"
                )
    sides = 1 if k is None else 2
    rounds = order.shape[3]
    for name, tensor in (("order", order), ("buckets", buckets), ("ranks", ranks)):
        if tensor is not None and (
            tuple(tensor.shape) != (sides, batch, heads, rounds, n) or tensor.dtype != torch.int32
        ):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; "
                f"it must be int32 [{sides}, b, h, r, n]"
            )
    if mask is not None and (tuple(mask.shape) != (batch, n) or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; it must be bool {[batch, n]}")
    if rounds == 0 or chunk_length not in CHUNK_LENGTHS:
        raise ValueError(
            f"order has {rounds} rounds and chunk_length is {chunk_length}; see lsh_attention"
        )
    if (reference.dropout_threshold(dropout_p) > 0) and (
        seed is None or seed.dtype != torch.int64 or seed.numel() != 1
    ):
        raise ValueError(f"seed is {seed}; dropout needs an int64 tensor of one element")
    checks.one_of("key_norm", key_norm, lsh_options.KEY_NORMS)
    checks.one_of("wrap", wrap, lsh_options.WRAPS)
    checks.one_device(q, k, v, order, buckets, ranks, mask, seed)


def shares_heads(heads: int, key_heads: int) -> bool:
    """Return whether each head of the keys can serve an equal number of the queries' heads."""
    return heads == key_heads or (heads > 0 and key_heads > 0 and heads % key_heads == 0)


def _check_backward(dout, dlse, q, k, v, out, lse, order, *rest) -> None:
    *rest, _needs = rest
    _check_attention(q, k, v, order, *rest)
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


# --- fakes ---


def _attention_fake(q, k, v, order, *rest):
    return allocate_like(q, q.shape[1], v.shape[-1]), q.new_empty(q.shape[:3], dtype=sum_dtype(q))


def _backward_fake(dout, dlse, q, k, v, out, lse, order, *rest):
    needs = rest[-1]
    return tuple(
        allocate_like(tensor, tensor.shape[1], tensor.shape[3])
        if tensor is not None and need
        else q.new_empty(0)
        for tensor, need in zip((q, k, v), needs)
    )


# --- launches: kernels take rows without gaps, wherever the rows lie ---


def _launch_attention(launcher, q, k, v, *rest):
    q, k, v = map(_with_dense_rows, (q, k, v))
    return launcher(q, k, v, *_contiguous(*rest))


def _launch_backward(launcher, dout, dlse, q, k, v, out, lse, *rest):
    dout, q, k, v, out = map(_with_dense_rows, (dout, q, k, v, out))
    dlse, lse, *rest = _contiguous(dlse, lse, *rest)
    return launcher(dout, dlse, q, k, v, out, lse, *rest)


def _with_dense_rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(3) == 1 or x.shape[3] == 1 else _lay_out(x, x)


def _lay_out(x: Tensor, like: Tensor) -> Tensor:
    if is_token_major(like):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()


def _contiguous(*args: object) -> Iterator[object]:
    return (arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)


# --- references, with results laid out as the fakes promise ---


def _attention_reference(q, k, v, order, *rest):
    out, lse = reference.lsh_attention_op(*_contiguous(q, k, v, order, *rest))
    return _lay_out(out, q), lse.contiguous()


def _backward_reference(dout, dlse, q, k, v, *rest):
    grads = reference.lsh_attention_backward_op(*_contiguous(dout, dlse, q, k, v, *rest))
    return tuple(
        _lay_out(grad, x) if grad.dim() == 4 else grad for grad, x in zip(grads, (q, k, v))
    )


# --- registration ---

attention = registry.register(
    "lsh_attention",
    check=_check_attention,
    fake=_attention_fake,
    kernel="lsh_attention:lsh_attention",
    launch=_launch_attention,
    reference=_attention_reference,
    keeps_layout=True,
)

attention_backward = registry.register(
    "lsh_attention_backward",
    check=_check_backward,
    fake=_backward_fake,
    kernel="lsh_attention_backward:lsh_attention_backward",
    launch=_launch_backward,
    reference=_backward_reference,
    keeps_layout=True,
)
