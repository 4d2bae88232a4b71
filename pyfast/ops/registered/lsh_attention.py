"""LSH attention's registered ops: checks, fakes, launchers."""

import importlib

import torch
from torch import Tensor

from pyfast import reference
from pyfast._support import checks, registry
from pyfast.kernels._layout import by_tokens, empty
from pyfast.reference import lsh_options

CHUNK_LENGTHS, MOST_DIM = range(16, 257, 16), 256


def _check(
    q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length, scale, key_norm, wrap, *_
) -> None:
    """What memory safety rests on, for the paths that C++ does not check."""
    if any(t.dim() != 4 or not 1 <= t.shape[-1] <= MOST_DIM for t in (q, v)) or order.dim() != 5:
        raise ValueError(
            f"q, v, order: {_shapes(q, v, order)}; they must be [b, h, n, d], [b, h, n, e], [s, b, h, r, n]"
        )
    batch, heads, n, dim = q.shape
    for name, tensor, width in (("k", k, dim), ("v", v, v.shape[-1])):
        if tensor is not None:
            fits = _shares(heads, tensor.shape[1])
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
                f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be int32 [{sides}, b, h, r, n]"
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
    found = {t.device for t in (q, k, v, order, buckets, ranks, mask, seed) if t is not None}
    if len(found) > 1:
        raise ValueError(
            f"the arguments are on {', '.join(sorted(map(str, found)))}; they must be on one device"
        )


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
    return kernels.lsh_attention_backward(
        dout, *_contiguous(dlse), q, k, v, out, *_contiguous(lse, *rest)
    )


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
        return tuple(
            _laid_out(grad, x) if grad.dim() == 4 else grad for grad, x in zip(found, (q, k, v))
        )

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
