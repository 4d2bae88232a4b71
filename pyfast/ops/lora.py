r"""LoRA: a linear layer and its low-rank update as one op, over a dense or an NF4 weight.

    y = g (x W^T + s (drop(x) A^T B^T + lora_bias)) + bias        g = 1, or DoRA's magnitude / ||W + s B A||

    S  = s drop(x) A^T              lora_shrink            one pass over x, for all projections that share it
    y  = g (x W^T + S B^T) + bias   lora_linear            S B^T: r more columns of the sum, rounded once with it
    U  = s (g dy) B, dB, sums       lora_expand_backward   one pass over dy
    dx = (g dy) W + mask (U A)      lora_linear_backward
    dA = U^T drop(x)                lora_shrink_backward

Kept for the backward: x, S, and for DoRA's magnitude z = y before g and bias. The dropout mask is
Philox(seed, row, column), made again where it is needed. `pyfast/reference/_lora.py` is the
specification.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyfast import reference
from pyfast._support import checks, dtypes
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.ops.lora_arguments import (
    Projection,
    _base_of,
    _bias_dtype,
    _check_probability,
    _check_projection,
    _route,
    _scales,
    _seeds,
)
from pyfast.ops.lora_autograd import _LoRALinear, _output, _Spec, _Tensors
from pyfast.ops.registered import lora

# --- the functions ---


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
    seed: int | Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Y = g (x W^T + scaling (drop(x) A^T B^T + lora_bias)) + bias. Differentiable in every
    floating tensor.

    Args:
        x: [..., in], float32, bfloat16 or float16 (and float64); autocast applies. weight: [out,
        in], of any floating dtype, or an NF4Weight of that shape, which is frozen. lora_a: [r, in],
        in float32 or x's dtype; x is never copied to another for its sake. lora_b: [out, r], as
        lora_a. scaling: alpha / r, or alpha / sqrt(r). bias: [out], the layer's. lora_bias: [out],
        B's; it is scaled. dropout_p: of drop(x), to the nearest 2^-16. With DoRA only the low-rank
        half sees the dropped x (PEFT's base
            half does, too).
        seed: of the dropout mask; by default a new one from torch's generator. magnitude: [out]:
        DoRA, g = magnitude / ||W + scaling B A|| a row; the norm is a constant to autograd.
    """
    projection = Projection(weight, lora_a, lora_b, scaling, bias, lora_bias, magnitude)
    return lora_linears(
        x, [projection], dropout_p=dropout_p, seeds=None if seed is None else [seed]
    )[0]


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    dropout_p: float = 0.0,
    seeds: Sequence[int | Tensor] | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of layers that share x (q, k, v; gate, up): one pass over x for all S, none to
    add up the dx.

    Each has its own dropout mask, from its own seed.
    """
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    if not projections:
        raise ValueError("projections is empty; it must hold at least one")
    _check_probability(dropout_p)
    dtype = dtypes.compute_dtype(x)
    bases = [_check_projection(x, dtype, p) for p in projections]
    seeds = _seeds(x, seeds, len(projections)) if reference.dropout_threshold(dropout_p) else None
    packed = []
    for p, base in zip(projections, bases):
        norm = None
        if p.magnitude is not None:
            norm = dora_norm(p.weight, p.lora_a, p.lora_b, p.scaling, p.row_squares)
        bias = None if p.bias is None else p.bias.to(_bias_dtype(p.bias, dtype))
        packed.append(
            _Tensors(p.lora_a[None], p.lora_b[None], bias, p.lora_bias, p.magnitude, norm, base)
        )
    return _apply(
        x.to(dtype), dropout_p, seeds, [p.scaling for p in projections], projections, packed, []
    )


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    adapter_ids: Tensor,
    scaling: float | Sequence[float] | Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Row i of y = W x_i + scaling[id] B[id] A[id] x_i + bias, id = adapter_ids[i]. Differentiable,
    as `lora_linear`.

    Args:
        x: [..., in]. weight: [out, in], dense or an NF4Weight. lora_a: [n, r, in] of n adapters;
        one of a smaller rank is padded with zeros. lora_b: [n, out, r]. adapter_ids: one for each
        row of x, of shape x.shape[:-1], integers from -1 (no adapter) to n - 1. scaling: one for
        all adapters, or one each. bias: [out].
    """
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    checks.tensor("lora_a", lora_a, checks.FLOATS_AND_DOUBLE)
    if lora_a.dim() != 3:
        raise ValueError(f"lora_a has shape {list(lora_a.shape)}; it must be [adapters, rank, in]")
    dtype, n = dtypes.compute_dtype(x), len(lora_a)
    projection = Projection(weight, lora_a, lora_b, 1.0, bias)
    base = _check_projection(x, dtype, projection, adapters=n)
    route = _route(x, adapter_ids, _scales(scaling, n, x.device), n)
    bias = None if bias is None else bias.to(_bias_dtype(bias, dtype))
    packed = [_Tensors(lora_a, lora_b, bias, None, None, None, base)]
    return _apply(x.to(dtype), 0.0, None, [1.0], [projection], packed, route)[0]


def row_squares(weight: Tensor | NF4Weight) -> Tensor:
    """||W||^2 of each row, float32: what DoRA's norm needs of a frozen weight only once."""
    if not isinstance(weight, NF4Weight):
        checks.tensor("weight", weight, checks.FLOATS_AND_DOUBLE)
    if len(weight.shape) != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; a linear layer's is [out, in]")
    return lora.row_squares(*_base_of(weight))


@torch.no_grad()
def dora_norm(
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    squares: Tensor | None = None,
) -> Tensor:
    """||W + s B A|| of each row, without the product B A: ||W||^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B>."""
    base, shape, blocksize = _base_of(weight)
    wide = (
        lora.sum_dtype(lora_a)
        if blocksize
        else torch.promote_types(lora.sum_dtype(lora_a), weight.dtype)
    )
    a, b = lora_a.to(wide), lora_b.to(wide)
    on_tensor_cores = not blocksize and weight.is_cuda and weight.dtype == torch.bfloat16
    wa = (
        _low_rank_of(weight, a) if on_tensor_cores else _times(a, base, shape, blocksize).t()
    )  # [out, r]
    ba = _times(b, [_times(a, [a], a.shape, 0)], (len(a), len(a)), 0)  # B (A A^T)
    squares = lora.row_squares(base, shape, blocksize) if squares is None else squares
    total = squares + 2 * scaling * (b * wa).sum(1) + scaling**2 * (ba * b).sum(1)
    return total.clamp(min=0).sqrt()


def _low_rank_of(w: Tensor, a: Tensor) -> Tensor:
    """W A^T in float32 for a bf16 W, whose type has float32's range: of A's upper bits and of what they leave."""
    high = a.to(w.dtype)
    parts = torch.stack([high, (a - high).to(w.dtype)])[:, None]
    found = lora.shrink(w, list(parts), [1.0, 1.0], 0.0, None, [])
    return found.unflatten(1, (2, len(a))).sum(1)


def _times(x: Tensor, base: list[Tensor], shape: tuple[int, int], blocksize: int) -> Tensor:
    """X W^T, in float32 under autocast too, and the same bits on any number of threads."""
    nothing = x.new_empty(len(x), 0), x.new_empty(1, shape[0], 0)
    return lora.linear(x, nothing[0], base, nothing[1], None, None, shape, blocksize, [])


def _apply(x, dropout_p, seeds, scaling, projections, packed, route) -> tuple[Tensor, ...]:
    specs = []
    for s, p, t in zip(scaling, projections, packed):
        _, shape, blocksize = _base_of(p.weight)
        specs.append(_Spec(s, shape, blocksize, len(t.base)))
    flat = [tensor for t in packed for tensor in (*t[:-1], *t.base)]
    leaf = x.requires_grad or any(t is not None and t.requires_grad for t in flat)
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and leaf):
        return _LoRALinear.apply(x, dropout_p, seeds, tuple(specs), len(route), *route, *flat)
    s = lora.shrink(x, [t.lora_a for t in packed], scaling, dropout_p, seeds, route)
    parts = s.split([t.lora_a.shape[1] for t in packed], dim=-1)
    return tuple(
        _output(spec, t, x, part, route, False)[0] for spec, t, part in zip(specs, packed, parts)
    )
