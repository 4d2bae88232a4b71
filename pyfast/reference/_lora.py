"""LoRA: a linear layer and its low-rank update, over a dense or an NF4 weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast._support.dtypes import sum_dtype
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.reference._common import dropout_mask, dropout_threshold
from pyfast.reference._nf4 import nf4_values


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Return g (x W^T + scaling (drop(x) A^T B^T + lora_bias)) + bias.

    g = 1, or with a magnitude (DoRA) magnitude / ||W + scaling B A||, with a norm for each row,
    which is a constant to autograd.
    """
    w = _dense(weight, x.dtype)
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    y = F.linear(x, w) + scaling * F.linear(F.linear(_dropped(x, dropout_p, seed), a), b)
    if lora_bias is not None:
        y = y + scaling * lora_bias.to(x.dtype)
    if magnitude is not None:
        norm = (w + scaling * b @ a).detach().norm(dim=1)
        y = y * (magnitude.to(x.dtype) / norm)
    return y if bias is None else y + bias.to(x.dtype)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    adapter_ids: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Return y_i = W x_i + scaling[id] B[id] A[id] x_i + bias with id = adapter_ids[i].

    The id -1 means no adapter.
    """
    y = F.linear(x, _dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    scaling = torch.as_tensor(scaling, dtype=x.dtype, device=x.device).expand(len(lora_a))
    for i, (a, b) in enumerate(zip(lora_a.to(x.dtype), lora_b.to(x.dtype))):
        has_adapter = (adapter_ids == i)[..., None]
        y = y + has_adapter * scaling[i] * F.linear(F.linear(x, a), b)
    return y


def _dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, NF4Weight):
        return nf4_values(weight.state, weight.shape, weight.blocksize).to(dtype)
    return weight.to(dtype)


def _dropped(x: Tensor, p: float, seed: int | None) -> Tensor:
    if dropout_threshold(p) == 0:
        return x
    mask = dropout_mask(x.shape[:-1].numel(), x.shape[-1], p, seed, x.device)
    return x * mask.view(x.shape).to(x.dtype)


# The registered ops. `route` sorts rows by adapter: [] for one adapter, or [order, starts, scales].
# Segment i, the rows order[starts[i] : starts[i + 1]], has adapter i and scale scales[i]. The rows
# before starts[0] have no adapter.


def lora_shrink_op(x, lora_a, scaling, dropout_p, seeds, route):
    """Return S = [scaling_i drop_i(x) A_i^T] of all projections i that share x.

    lora_a holds [n, r_i, in] for each.
    """
    accumulate_dtype = sum_dtype(x)
    parts = []
    for i, a in enumerate(lora_a):
        dropped = _dropped(
            x.to(accumulate_dtype), dropout_p, None if seeds is None else int(seeds[i])
        )
        parts.append(_routed(dropped, a.to(accumulate_dtype).mT, route) * scaling[i])
    return torch.cat(parts, dim=-1)


def lora_linear_op(x, s, base, lora_b, bias, gain, shape, blocksize, route):
    """Return gain (x W^T + S B^T) + bias; lora_b is [n, out, r]."""
    accumulate_dtype = sum_dtype(x)
    w = _base_values(base, shape, blocksize, accumulate_dtype)
    y = F.linear(x.to(accumulate_dtype), w) + _routed(
        s.to(accumulate_dtype), lora_b.to(accumulate_dtype).mT, route, scaled=False
    )
    y = y if gain is None else y * gain.to(accumulate_dtype)
    return (y if bias is None else y + bias.to(accumulate_dtype)).to(x.dtype)


def lora_expand_backward_op(dy, s, lora_b, gain, z, scaling, route, needs):
    """Return U = scaling (gain dy) B, dB = (gain dy)^T S, sum(dy) and sum(dy z).

    Those that `needs` does not ask for are empty. It is one pass over dy.
    """
    accumulate_dtype = sum_dtype(dy)
    dy = dy.to(accumulate_dtype)
    scaled = dy if gain is None else dy * gain.to(accumulate_dtype)
    u = (
        _routed(scaled, lora_b.to(accumulate_dtype), route) * scaling
        if needs[0]
        else dy.new_empty(0)
    )
    db = (
        _routed_outer(scaled, s.to(accumulate_dtype), route, len(lora_b))
        if needs[1]
        else dy.new_empty(0)
    )
    sums = [dy, dy if z is None else dy * z.to(accumulate_dtype)]
    sums = [
        t.reshape(dy.shape[:-1].numel(), dy.shape[-1]).sum(0) if need else dy.new_empty(0)
        for t, need in zip(sums, needs[2:])
    ]
    return u, db.to(lora_b.dtype), *sums


def lora_linear_backward_op(
    dy, u, base, lora_a, gain, add, shape, blocksize, dropout_p, seed, route
):
    """Return dx = (gain dy) W + mask (U A) + add."""
    accumulate_dtype = sum_dtype(dy)
    scaled = (
        dy.to(accumulate_dtype)
        if gain is None
        else dy.to(accumulate_dtype) * gain.to(accumulate_dtype)
    )
    low = _routed(u.to(accumulate_dtype), lora_a.to(accumulate_dtype), route, scaled=False)
    dx = scaled @ _base_values(base, shape, blocksize, accumulate_dtype) + _dropped(
        low, dropout_p, seed and int(seed)
    )
    return (dx if add is None else dx + add.to(accumulate_dtype)).to(dy.dtype)


def lora_shrink_backward_op(u, x, ranks, n, dropout_p, seeds, route, dtype):
    """Return dA_i = U_i^T drop_i(x), [n, r_i, in] each, for U = [U_i]."""
    accumulate_dtype, grads = sum_dtype(x), []
    for i, part in enumerate(u.to(accumulate_dtype).split(ranks, dim=-1)):
        dropped = _dropped(
            x.to(accumulate_dtype), dropout_p, None if seeds is None else int(seeds[i])
        )
        grads.append(_routed_outer(part, dropped, route, n).to(dtype))
    return grads


def _base_values(base, shape, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Return W: a dense base is one tensor, with blocksize 0, any other an NF4Weight's state."""
    return (base[0] if blocksize == 0 else nf4_values(base, shape, blocksize)).to(dtype)


def _segments(route):
    order, starts, scales = route
    for i, (begin, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:])):
        yield i, order[begin:end].long(), scales[i]


def _routed(x: Tensor, matrices: Tensor, route, scaled: bool = True) -> Tensor:
    """Multiply each row by its adapter's matrix (and scale); rows without an adapter give zero."""
    if not route:
        return x @ matrices[0]
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_zeros(len(rows), matrices.shape[-1])
    for i, rows_of_adapter, scale in _segments(route):
        out[rows_of_adapter] = rows[rows_of_adapter] @ matrices[i] * (scale if scaled else 1)
    return out.view(*x.shape[:-1], -1)


def _routed_outer(a: Tensor, b: Tensor, route, n: int) -> Tensor:
    """Return a^T b over the rows of each adapter, [n, a's width, b's width]."""
    a, b = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (a, b))
    if not route:
        return (a.t() @ b)[None]
    out = a.new_zeros(n, a.shape[1], b.shape[1])
    for i, rows_of_adapter, _ in _segments(route):
        out[i] = a[rows_of_adapter].t() @ b[rows_of_adapter]
    return out


def lora_row_squares_op(base, shape, blocksize):
    """Return ||W||^2 of each row."""
    accumulate_dtype = torch.float32 if blocksize else sum_dtype(base[0])
    return _base_values(base, shape, blocksize, accumulate_dtype).square().sum(1)
