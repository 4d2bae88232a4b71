"""LoRA: a linear layer and its low-rank update, over a dense or an NF4 weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast.formats.nf4_weight import NF4Weight
from pyfast.reference._common import dropout_mask, dropout_threshold, sum_dtype
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
    """Y = g (x W^T + scaling (drop(x) A^T B^T + lora_bias)) + bias.

    g = 1, or with a magnitude (DoRA) magnitude / ||W + scaling B A||, a norm a row, a constant to
    autograd.
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
    """Row i of y = W x_i + scaling[id] B[id] A[id] x_i + bias, id = adapter_ids[i]; -1: no adapter."""
    y = F.linear(x, _dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    scaling = torch.as_tensor(scaling, dtype=x.dtype, device=x.device).expand(len(lora_a))
    for i, (a, b) in enumerate(zip(lora_a.to(x.dtype), lora_b.to(x.dtype))):
        mine = (adapter_ids == i)[..., None]
        y = y + mine * scaling[i] * F.linear(F.linear(x, a), b)
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


# The registered ops. `route` sorts rows by adapter: [] for one adapter, or [order, starts, scales],
# where segment i, the rows order[starts[i] : starts[i + 1]], has adapter i and scale scales[i]; the
# rows before starts[0] have none.


def lora_shrink_op(x, lora_a, scaling, dropout_p, seeds, route):
    """S = [scaling_i drop_i(x) A_i^T for every projection i that shares x]; lora_a: [n, r_i, in] each."""
    wide = sum_dtype(x)
    parts = []
    for i, a in enumerate(lora_a):
        dropped = _dropped(x.to(wide), dropout_p, None if seeds is None else int(seeds[i]))
        parts.append(_routed(dropped, a.to(wide).mT, route) * scaling[i])
    return torch.cat(parts, dim=-1)


def lora_linear_op(x, s, base, lora_b, bias, gain, shape, blocksize, route):
    """Y = gain (x W^T + S B^T) + bias; lora_b: [n, out, r]."""
    wide = sum_dtype(x)
    w = _base_values(base, shape, blocksize, wide)
    y = F.linear(x.to(wide), w) + _routed(s.to(wide), lora_b.to(wide).mT, route, scaled=False)
    y = y if gain is None else y * gain.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def lora_expand_backward_op(dy, s, lora_b, gain, z, scaling, route, needs):
    """U = scaling (gain dy) B, dB = (gain dy)^T S, sum(dy), sum(dy z), as `needs` says: one pass over dy."""
    wide = sum_dtype(dy)
    dy = dy.to(wide)
    scaled = dy if gain is None else dy * gain.to(wide)
    u = _routed(scaled, lora_b.to(wide), route) * scaling if needs[0] else dy.new_empty(0)
    db = _routed_outer(scaled, s.to(wide), route, len(lora_b)) if needs[1] else dy.new_empty(0)
    sums = [dy, dy if z is None else dy * z.to(wide)]
    sums = [
        t.reshape(dy.shape[:-1].numel(), dy.shape[-1]).sum(0) if need else dy.new_empty(0)
        for t, need in zip(sums, needs[2:])
    ]
    return u, db.to(lora_b.dtype), *sums


def lora_linear_backward_op(
    dy, u, base, lora_a, gain, add, shape, blocksize, dropout_p, seed, route
):
    """Dx = (gain dy) W + mask (U A) + add."""
    wide = sum_dtype(dy)
    scaled = dy.to(wide) if gain is None else dy.to(wide) * gain.to(wide)
    low = _routed(u.to(wide), lora_a.to(wide), route, scaled=False)
    dx = scaled @ _base_values(base, shape, blocksize, wide) + _dropped(
        low, dropout_p, seed and int(seed)
    )
    return (dx if add is None else dx + add.to(wide)).to(dy.dtype)


def lora_shrink_backward_op(u, x, ranks, n, dropout_p, seeds, route, dtype):
    """DA_i = U_i^T drop_i(x), [n, r_i, in] each, of U = [U_i]."""
    wide, found = sum_dtype(x), []
    for i, part in enumerate(u.to(wide).split(ranks, dim=-1)):
        dropped = _dropped(x.to(wide), dropout_p, None if seeds is None else int(seeds[i]))
        found.append(_routed_outer(part, dropped, route, n).to(dtype))
    return found


def _base_values(base, shape, blocksize: int, dtype: torch.dtype) -> Tensor:
    """A dense base is one tensor, with blocksize 0; any other is the state of an NF4Weight."""
    return (base[0] if blocksize == 0 else nf4_values(base, shape, blocksize)).to(dtype)


def _segments(route):
    order, starts, scales = route
    for i, (begin, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:])):
        yield i, order[begin:end].long(), scales[i]


def _routed(x: Tensor, matrices: Tensor, route, scaled: bool = True) -> Tensor:
    """Each row times its adapter's matrix (and scale); rows without one give zero."""
    if not route:
        return x @ matrices[0]
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_zeros(len(rows), matrices.shape[-1])
    for i, mine, scale in _segments(route):
        out[mine] = rows[mine] @ matrices[i] * (scale if scaled else 1)
    return out.view(*x.shape[:-1], -1)


def _routed_outer(a: Tensor, b: Tensor, route, n: int) -> Tensor:
    """a^T b over the rows of each adapter. [n, a's width, b's width]"""
    a, b = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (a, b))
    if not route:
        return (a.t() @ b)[None]
    out = a.new_zeros(n, a.shape[1], b.shape[1])
    for i, mine, _ in _segments(route):
        out[i] = a[mine].t() @ b[mine]
    return out


def lora_row_squares_op(base, shape, blocksize):
    """||W||^2 of each row."""
    wide = torch.float32 if blocksize else sum_dtype(base[0])
    return _base_values(base, shape, blocksize, wide).square().sum(1)
