r"""LoRA: a linear layer and its low-rank update as one op, over a dense or an NF4 weight.

    y = g (x W^T + s (drop(x) A^T B^T + lora_bias)) + bias        g = 1, or DoRA's magnitude / ||W + s B A||

    S  = s drop(x) A^T              lora_shrink            one pass over x, for all projections that share it
    y  = g (x W^T + S B^T) + bias   lora_linear            S B^T: r more columns of the sum, rounded once with it
    U  = s (g dy) B, dB, sums       lora_expand_backward   one pass over dy
    dx = (g dy) W + mask (U A)      lora_linear_backward
    dA = U^T drop(x)                lora_shrink_backward

Kept for the backward: x, S, and for DoRA's magnitude z = y before g and bias. The dropout mask is Philox(seed, row,
column), made again where it is needed. `pyfast/reference/_lora.py` is the specification.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from pyfast import reference
from pyfast._support import checks, registry
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.ops.registered import lora


class _Spec(NamedTuple):
    """What a projection has beside its tensors."""

    scaling: float
    shape: tuple[int, int]
    blocksize: int
    tensors: int  # of its base


class _Tensors(NamedTuple):
    """The tensors of a projection, None where it has none."""

    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    lora_bias: Tensor | None
    magnitude: Tensor | None
    norm: Tensor | None
    base: tuple[Tensor, ...]


def _unpack(specs: Sequence[_Spec], flat: Sequence) -> list[_Tensors]:
    found, at, own = [], 0, len(_Tensors._fields) - 1
    for spec in specs:
        found.append(_Tensors(*flat[at : at + own], tuple(flat[at + own : at + own + spec.tensors])))
        at += own + spec.tensors
    return found


def _gain(t: _Tensors) -> Tensor | None:
    return None if t.magnitude is None else t.magnitude.to(t.norm.dtype) / t.norm


def _scaled_lora_bias(t: _Tensors, scaling: float) -> Tensor | None:
    return None if t.lora_bias is None else t.lora_bias.to(lora.sum_dtype(t.lora_bias)) * scaling


def _output(spec: _Spec, t: _Tensors, x: Tensor, s: Tensor, route, keep_z: bool) -> tuple[Tensor, Tensor | None]:
    """Y, in one op; or, where DoRA's magnitude trains, z = x W^T + S B^T + s lora_bias and y = g z + bias."""
    gain, added = _gain(t), _scaled_lora_bias(t, spec.scaling)
    if keep_z:
        z = lora.linear(x, s, t.base, t.lora_b, added, None, spec.shape, spec.blocksize, route)
        y = z * gain if t.bias is None else z * gain + t.bias
        # Nothing in place, no `to` that does nothing: torch 2.11 compiles that to gradients of zero.
        return y if y.dtype == x.dtype else y.to(x.dtype), z
    if added is not None and gain is not None:
        added = added * gain
    bias = t.bias if added is None else added if t.bias is None else added + t.bias
    return lora.linear(x, s, t.base, t.lora_b, bias, gain, spec.shape, spec.blocksize, route), None


class _LoRALinear(torch.autograd.Function):
    """Projections that share x; `route` is [] or the three tensors of a batch of several adapters."""

    @staticmethod
    def forward(ctx, x, dropout_p, seeds, specs, routed, *flat):
        route, flat = flat[:routed], flat[routed:]
        projections, needs = _unpack(specs, flat), _unpack(specs, ctx.needs_input_grad[5 + routed :])
        rows = x.contiguous()  # once for all ops
        s = lora.shrink(rows, [t.lora_a for t in projections], [p.scaling for p in specs], dropout_p, seeds, route)
        parts = s.split([t.lora_a.shape[1] for t in projections], dim=-1)
        each = zip(specs, projections, parts, needs)
        ys, zs = zip(*(_output(spec, t, rows, part, route, need.magnitude) for spec, t, part, need in each))
        keep_x = any(n.lora_a or any(n.base) for n in needs)
        keep_s = any(n.lora_b for n in needs)
        ctx.dropout_p, ctx.specs, ctx.routed = dropout_p, specs, routed
        ctx.save_for_backward(x if keep_x else None, s if keep_s else None, seeds, *route, *zs, *flat)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        (x, s, seeds, *rest), count = ctx.saved_tensors, len(dys)
        route, zs, flat = rest[: ctx.routed], rest[ctx.routed : ctx.routed + count], rest[ctx.routed + count :]
        projections, needs = _unpack(ctx.specs, flat), _unpack(ctx.specs, ctx.needs_input_grad[5 + ctx.routed :])
        ranks = [t.lora_a.shape[1] for t in projections]
        parts = [None] * count if s is None else s.split(ranks, dim=-1)
        dx, us, grads = None, [], []
        for i, (spec, t, need, dy, part, z) in enumerate(zip(ctx.specs, projections, needs, dys, parts, zs)):
            gain, dy = _gain(t), dy.contiguous()
            u, found = _backward_of_one(spec, t, need, dy, part, z, x, gain, route, ctx.needs_input_grad[0])
            if ctx.needs_input_grad[0]:
                seed = None if seeds is None else seeds[i]
                dx = lora.linear_backward(
                    dy, u, t.base, t.lora_a, gain, dx, spec.shape, spec.blocksize, ctx.dropout_p, seed, route
                )
            us.append(u)
            grads.append(found)
        if any(need.lora_a for need in needs):
            grads = _with_lora_a(grads, us, x, ranks, projections, needs, ctx.dropout_p, seeds, route)
        flat_grads = (g for found in grads for g in (*found[:-1], *found.base))
        return dx, None, None, None, None, *(None for _ in route), *flat_grads


def _backward_of_one(spec, t, need, dy, s, z, x, gain, route, need_x):
    """U, if anything needs it, and the gradients that one pass over dy gives."""
    wants = [need_x or need.lora_a, need.lora_b, need.bias or need.lora_bias, need.magnitude]
    u = db = dbias = dlora_bias = dmagnitude = None
    if any(wants):
        s = dy.new_empty(*dy.shape[:-1], t.lora_b.shape[2], dtype=lora.sum_dtype(dy)) if s is None else s
        u, db, total, weighted = lora.expand_backward(dy, s, t.lora_b, gain, z, spec.scaling, route, wants)
        if need.magnitude:
            dmagnitude = (weighted / t.norm).to(t.magnitude.dtype)
        if need.lora_bias:
            dlora_bias = (total * spec.scaling * (1 if gain is None else gain)).to(t.lora_bias.dtype)
        dbias = total.to(t.bias.dtype) if need.bias else None
        db = db if need.lora_b else None
    dbase = tuple(_dense_gradient(dy, gain, x, w) if wanted else None for w, wanted in zip(t.base, need.base))
    return u, _Tensors(None, db, dbias, dlora_bias, dmagnitude, None, dbase)


def _dense_gradient(dy: Tensor, gain: Tensor | None, x: Tensor, w: Tensor) -> Tensor:
    dy = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    dw = dy.t() @ x.reshape(len(dy), x.shape[-1])
    return (dw if gain is None else dw * gain[:, None]).to(w.dtype)


def _with_lora_a(grads, us, x, ranks, projections, needs, dropout_p, seeds, route):
    """The gradients of every A that needs one, from one pass over x."""
    mine = [i for i, need in enumerate(needs) if need.lora_a]
    u = us[mine[0]] if len(mine) == 1 else torch.cat([us[i] for i in mine], dim=-1)
    chosen = seeds if seeds is None or len(mine) == len(needs) else seeds[mine]
    first = projections[mine[0]].lora_a
    mixed = len({projections[i].lora_a.dtype for i in mine}) > 1
    wide = lora.sum_dtype(first) if mixed else first.dtype
    das = lora.shrink_backward(u, x, [ranks[i] for i in mine], first.shape[0], dropout_p, chosen, route, wide)
    for i, da in zip(mine, das):
        grads[i] = grads[i]._replace(lora_a=da.to(projections[i].lora_a.dtype))
    return grads


# --- the functions ---


@dataclass(frozen=True, eq=False)
class Projection:
    """One of the layers that `lora_linears` applies to the same x; fields as `lora_linear`'s arguments."""

    weight: Tensor | NF4Weight
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    lora_bias: Tensor | None = None
    magnitude: Tensor | None = None
    row_squares: Tensor | None = None  # of the weight, if known: `row_squares(weight)`


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
    """Y = g (x W^T + scaling (drop(x) A^T B^T + lora_bias)) + bias. Differentiable in every floating tensor.

    Args:
        x: [..., in], float32, bfloat16 or float16 (and float64); autocast applies.
        weight: [out, in], of any floating dtype, or an NF4Weight of that shape, which is frozen.
        lora_a: [r, in], in float32 or x's dtype; x is never copied to another for its sake.
        lora_b: [out, r], as lora_a.
        scaling: alpha / r, or alpha / sqrt(r).
        bias: [out], the layer's.
        lora_bias: [out], B's; it is scaled.
        dropout_p: of drop(x), to the nearest 2^-16. With DoRA only the low-rank half sees the dropped x (PEFT's base
            half does, too).
        seed: of the dropout mask; by default a new one from torch's generator.
        magnitude: [out]: DoRA, g = magnitude / ||W + scaling B A|| a row; the norm is a constant to autograd.
    """
    projection = Projection(weight, lora_a, lora_b, scaling, bias, lora_bias, magnitude)
    return lora_linears(x, [projection], dropout_p=dropout_p, seeds=None if seed is None else [seed])[0]


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    dropout_p: float = 0.0,
    seeds: Sequence[int | Tensor] | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of layers that share x (q, k, v; gate, up): one pass over x for all S, none to add up the dx.

    Each has its own dropout mask, from its own seed.
    """
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    if not projections:
        raise ValueError("projections is empty; it must hold at least one")
    _check_probability(dropout_p)
    dtype = registry.compute_dtype(x)
    bases = [_check_projection(x, dtype, p) for p in projections]
    seeds = _seeds(x, seeds, len(projections)) if reference.dropout_threshold(dropout_p) else None
    packed = []
    for p, base in zip(projections, bases):
        norm = None
        if p.magnitude is not None:
            norm = dora_norm(p.weight, p.lora_a, p.lora_b, p.scaling, p.row_squares)
        bias = None if p.bias is None else p.bias.to(_bias_dtype(p.bias, dtype))
        packed.append(_Tensors(p.lora_a[None], p.lora_b[None], bias, p.lora_bias, p.magnitude, norm, base))
    return _apply(x.to(dtype), dropout_p, seeds, [p.scaling for p in projections], projections, packed, [])


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
    """Row i of y = W x_i + scaling[id] B[id] A[id] x_i + bias, id = adapter_ids[i]. Differentiable, as `lora_linear`.

    Args:
        x: [..., in].
        weight: [out, in], dense or an NF4Weight.
        lora_a: [n, r, in] of n adapters; one of a smaller rank is padded with zeros.
        lora_b: [n, out, r].
        adapter_ids: one for each row of x, of shape x.shape[:-1], integers from -1 (no adapter) to n - 1.
        scaling: one for all adapters, or one each.
        bias: [out].
    """
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    checks.tensor("lora_a", lora_a, checks.FLOATS_AND_DOUBLE)
    if lora_a.dim() != 3:
        raise ValueError(f"lora_a has shape {list(lora_a.shape)}; it must be [adapters, rank, in]")
    dtype, n = registry.compute_dtype(x), len(lora_a)
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
    weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float, squares: Tensor | None = None
) -> Tensor:
    """||W + s B A|| of each row, without the product B A: ||W||^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B>."""
    base, shape, blocksize = _base_of(weight)
    wide = lora.sum_dtype(lora_a) if blocksize else torch.promote_types(lora.sum_dtype(lora_a), weight.dtype)
    a, b = lora_a.to(wide), lora_b.to(wide)
    on_tensor_cores = not blocksize and weight.is_cuda and weight.dtype == torch.bfloat16
    wa = _low_rank_of(weight, a) if on_tensor_cores else _times(a, base, shape, blocksize).t()  # [out, r]
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
    return tuple(_output(spec, t, x, part, route, False)[0] for spec, t, part in zip(specs, packed, parts))


def _base_of(weight: Tensor | NF4Weight) -> tuple[list[Tensor], tuple[int, int], int]:
    if isinstance(weight, NF4Weight):
        return weight.state, weight.shape, weight.blocksize
    return [weight], tuple(weight.shape), 0


def _bias_dtype(bias: Tensor, compute: torch.dtype) -> torch.dtype:
    """As it is where that is float32, or exact: the sum is rounded once, after it."""
    return bias.dtype if bias.dtype in (compute, torch.float32) else compute


def _seeds(x: Tensor, seeds, count: int) -> Tensor:
    if seeds is None:
        return torch.randint(2**63 - 1, (count,), device=x.device)
    if not isinstance(seeds, Tensor):
        if len(seeds) != count:
            raise ValueError(f"seeds are {len(seeds)}; there must be one for each of {count} projections")
        seeds = torch.stack([registry.seed_tensor(x, seed) for seed in seeds])
    if seeds.dtype != torch.int64 or seeds.shape != (count,):
        raise ValueError(f"seed is {seeds.dtype} {list(seeds.shape)}; it must be int64, one for each projection")
    return seeds.to(x.device)


def _scales(scaling, n: int, device) -> Tensor:
    if isinstance(scaling, Tensor):
        if scaling.requires_grad:
            raise ValueError("scaling requires grad; it gets none: detach it")
        if scaling.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(scaling.isfinite().all()):
            raise ValueError(f"scaling is {scaling.tolist()}; it must be finite")
        if scaling.numel() not in (1, n):
            raise ValueError(f"scaling has {scaling.numel()} elements; it must have 1, or one for each of {n} adapters")
        return scaling.detach().to(device, torch.float32).reshape(-1).expand(n).contiguous()
    if not isinstance(scaling, int | float | Sequence) or isinstance(scaling, str):
        raise TypeError(f"scaling must be a number, numbers or a tensor, not {type(scaling).__name__}")
    values = [scaling] * n if isinstance(scaling, int | float) else list(scaling)
    if len(values) != n:
        raise ValueError(f"scaling has {len(values)} elements; it must have 1, or one for each of {n} adapters")
    for value in values:
        _check_scaling(value)
    return torch.tensor(values, dtype=torch.float32, device=device)


def _route(x: Tensor, ids: Tensor, scales: Tensor, n: int) -> list[Tensor]:
    """Rows sorted by adapter, in their order within one; where each adapter's begin; its scale."""
    checks.tensor("adapter_ids", ids, (torch.int64, torch.int32, torch.int16, torch.int8))
    checks.shape("adapter_ids", ids, tuple(x.shape[:-1]))
    ids = ids.to(x.device, torch.int64).reshape(-1)
    if ids.numel() and not torch.compiler.is_compiling() and ids.device.type == "cpu":
        low, high = int(ids.min()), int(ids.max())
        if low < -1 or high >= n:
            worst = low if low < -1 else high
            raise ValueError(f"adapter_ids holds {worst}; it must hold -1, for none, to {n - 1}")
    else:
        torch._assert_async(((ids >= -1) & (ids < n)).all(), f"adapter_ids must hold -1, for none, to {n - 1}")
    order = torch.argsort(ids, stable=True)
    starts = torch.searchsorted(ids[order], torch.arange(n + 1, device=x.device))
    return [order.to(torch.int32), starts.to(torch.int32), scales]


def _check_probability(p: float) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise ValueError(f"dropout_p is {p!r}; it must be a number from 0 up to, but not including, 1")


def _check_scaling(scaling: float) -> None:
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not -math.inf < scaling < math.inf:
        raise ValueError(f"scaling is {scaling!r}; it must be a finite number")


def _check_projection(x: Tensor, dtype: torch.dtype, p: Projection, adapters: int | None = None) -> tuple[Tensor, ...]:
    """The tensors of its base, all that is wrong with it having been said."""
    if not isinstance(p.weight, NF4Weight):
        checks.tensor("weight", p.weight, checks.FLOATS_AND_DOUBLE)
    base, shape, _ = _base_of(p.weight)
    if len(shape) != 2:
        raise ValueError(f"weight has shape {list(shape)}; a linear layer's is [out, in]")
    if x.device.type == "cpu" and not base[0].is_contiguous() and not torch.compiler.is_compiling():
        registry.warn_once("on the CPU a weight that is not contiguous, such as a Conv1D's, is copied at every call")
    out, into = shape
    checks.last_dim("x", x, into, "the in_features of weight")
    _check_scaling(p.scaling)
    lead = () if adapters is None else (adapters,)
    checks.tensor("lora_a", p.lora_a, checks.FLOATS_AND_DOUBLE)
    rank = p.lora_a.shape[-2] if p.lora_a.dim() >= 2 else -1
    if p.lora_a.dim() != 2 + len(lead) or p.lora_a.shape[-1] != into:
        raise ValueError(f"lora_a has shape {list(p.lora_a.shape)}; it must be {[*lead, 'r', into]}, r the rank")
    checks.tensor("lora_b", p.lora_b, checks.FLOATS_AND_DOUBLE)
    checks.shape("lora_b", p.lora_b, (*lead, out, rank))
    vectors = {"bias": p.bias, "lora_bias": p.lora_bias, "magnitude": p.magnitude, "row_squares": p.row_squares}
    for name, vector in vectors.items():
        if vector is not None:
            checks.tensor(name, vector, checks.FLOATS_AND_DOUBLE)
            checks.shape(name, vector, (out,))
    others = {"weight": base[0], "lora_a": p.lora_a, "lora_b": p.lora_b, **vectors}
    for name, tensor in others.items():
        if tensor is not None:
            checks.same_device(name, tensor, "x", x.device)
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype == torch.float64 != x.dtype:
            raise TypeError(f"{name} is torch.float64 but x is {x.dtype}; float64 takes all of them, or none")
    for name in ("lora_a", "lora_b"):
        if others[name].dtype not in (torch.float32, x.dtype, dtype):
            raise TypeError(f"{name} is {others[name].dtype}; it must be torch.float32 or x's dtype, {x.dtype}")
    return tuple(base)
