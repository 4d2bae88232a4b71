"""The autograd function of LoRA's linear layers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        found.append(
            _Tensors(*flat[at : at + own], tuple(flat[at + own : at + own + spec.tensors]))
        )
        at += own + spec.tensors
    return found


def _gain(t: _Tensors) -> Tensor | None:
    return None if t.magnitude is None else t.magnitude.to(t.norm.dtype) / t.norm


def _scaled_lora_bias(t: _Tensors, scaling: float) -> Tensor | None:
    return None if t.lora_bias is None else t.lora_bias.to(lora.sum_dtype(t.lora_bias)) * scaling


def _output(
    spec: _Spec, t: _Tensors, x: Tensor, s: Tensor, route, keep_z: bool
) -> tuple[Tensor, Tensor | None]:
    """Y, in one op; or, where DoRA's magnitude trains, z = x W^T + S B^T + s lora_bias and y = g z + bias."""
    gain, added = _gain(t), _scaled_lora_bias(t, spec.scaling)
    if keep_z:
        z = lora.linear(x, s, t.base, t.lora_b, added, None, spec.shape, spec.blocksize, route)
        y = z * gain if t.bias is None else z * gain + t.bias
        # Nothing in place, no `to` that does nothing: torch 2.11 compiles that to gradients of
        # zero.
        return y if y.dtype == x.dtype else y.to(x.dtype), z
    if added is not None and gain is not None:
        added = added * gain
    bias = t.bias if added is None else added if t.bias is None else added + t.bias
    return lora.linear(x, s, t.base, t.lora_b, bias, gain, spec.shape, spec.blocksize, route), None


class _LeftTensors(NamedTuple):
    """Saved tensors that a backward through some outputs leaves for the others."""

    outputs: set[int]  # those that no backward has gone through yet
    tensors: tuple[Tensor | None, ...]
    versions: list[int | None]


def _saved_tensors(ctx, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the saved tensors, and keep them for the outputs that this backward leaves out.

    Each output can be differentiated once, as if it had a node of its own: autograd frees the
    tensors of the whole node after the first backward, although other outputs still need them.
    """
    if torch.compiler.is_compiling():
        return ctx.saved_tensors
    asked = {i for i, dy in enumerate(dys) if dy is not None}
    if ctx.left is None or not asked <= ctx.left.outputs:
        tensors, outputs = ctx.saved_tensors, set(range(len(dys)))
    else:
        outputs, tensors, versions = ctx.left
        if versions != _versions(tensors):
            raise RuntimeError(
                "a tensor needed for gradient computation has been modified by an inplace operation"
            )
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        left = outputs - asked
        ctx.left = _LeftTensors(left, tensors, _versions(tensors)) if left else None
    return tensors


def _versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor._version for tensor in tensors]


class _LoRALinear(torch.autograd.Function):
    """Projections that share x; `route` is [] or the three tensors of a batch of several adapters."""

    @staticmethod
    def forward(ctx, x, dropout_p, seeds, specs, routed, *flat):
        route, flat = flat[:routed], flat[routed:]
        projections, needs = (
            _unpack(specs, flat),
            _unpack(specs, ctx.needs_input_grad[5 + routed :]),
        )
        rows = x.contiguous()  # once for all ops
        s = lora.shrink(
            rows,
            [t.lora_a for t in projections],
            [p.scaling for p in specs],
            dropout_p,
            seeds,
            route,
        )
        parts = s.split([t.lora_a.shape[1] for t in projections], dim=-1)
        each = zip(specs, projections, parts, needs)
        ys, zs = zip(
            *(_output(spec, t, rows, part, route, need.magnitude) for spec, t, part, need in each)
        )
        keep_x = any(n.lora_a or any(n.base) for n in needs)
        keep_s = any(n.lora_b for n in needs)
        ctx.dropout_p, ctx.specs, ctx.routed, ctx.left = dropout_p, specs, routed, None
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if keep_x else None, s if keep_s else None, seeds, *route, *zs, *flat
        )
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        (x, s, seeds, *rest), count = _saved_tensors(ctx, dys), len(dys)
        route, zs, flat = (
            rest[: ctx.routed],
            rest[ctx.routed : ctx.routed + count],
            rest[ctx.routed + count :],
        )
        projections, needs = (
            _unpack(ctx.specs, flat),
            _unpack(ctx.specs, ctx.needs_input_grad[5 + ctx.routed :]),
        )
        ranks = [t.lora_a.shape[1] for t in projections]
        parts = [None] * count if s is None else s.split(ranks, dim=-1)
        dx, us, grads = None, [], []
        for i, (spec, t, need, dy, part, z) in enumerate(
            zip(ctx.specs, projections, needs, dys, parts, zs)
        ):
            if dy is None:
                us.append(None)
                grads.append(_Tensors(*[None] * (len(t) - 1), (None,) * len(t.base)))
                continue
            gain, dy = _gain(t), dy.contiguous()
            u, found = _backward_of_one(
                spec, t, need, dy, part, z, x, gain, route, ctx.needs_input_grad[0]
            )
            if ctx.needs_input_grad[0]:
                seed = None if seeds is None else seeds[i]
                dx = lora.linear_backward(
                    dy,
                    u,
                    t.base,
                    t.lora_a,
                    gain,
                    dx,
                    spec.shape,
                    spec.blocksize,
                    ctx.dropout_p,
                    seed,
                    route,
                )
            us.append(u)
            grads.append(found)
        with_lora_a = [i for i, need in enumerate(needs) if need.lora_a and dys[i] is not None]
        if with_lora_a:
            grads = _with_lora_a(
                grads, us, x, ranks, projections, with_lora_a, ctx.dropout_p, seeds, route
            )
        flat_grads = (g for found in grads for g in (*found[:-1], *found.base))
        return dx, None, None, None, None, *(None for _ in route), *flat_grads


def _backward_of_one(spec, t, need, dy, s, z, x, gain, route, need_x):
    """U, if anything needs it, and the gradients that one pass over dy gives."""
    wants = [need_x or need.lora_a, need.lora_b, need.bias or need.lora_bias, need.magnitude]
    u = db = dbias = dlora_bias = dmagnitude = None
    if any(wants):
        s = (
            dy.new_empty(*dy.shape[:-1], t.lora_b.shape[2], dtype=lora.sum_dtype(dy))
            if s is None
            else s
        )
        u, db, total, weighted = lora.expand_backward(
            dy, s, t.lora_b, gain, z, spec.scaling, route, wants
        )
        if need.magnitude:
            dmagnitude = (weighted / t.norm).to(t.magnitude.dtype)
        if need.lora_bias:
            dlora_bias = (total * spec.scaling * (1 if gain is None else gain)).to(
                t.lora_bias.dtype
            )
        dbias = total.to(t.bias.dtype) if need.bias else None
        db = db if need.lora_b else None
    dbase = tuple(
        _dense_gradient(dy, gain, x, w) if wanted else None for w, wanted in zip(t.base, need.base)
    )
    return u, _Tensors(None, db, dbias, dlora_bias, dmagnitude, None, dbase)


def _dense_gradient(dy: Tensor, gain: Tensor | None, x: Tensor, w: Tensor) -> Tensor:
    dy = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    dw = dy.t() @ x.reshape(len(dy), x.shape[-1])
    return (dw if gain is None else dw * gain[:, None]).to(w.dtype)


def _with_lora_a(grads, us, x, ranks, projections, chosen, dropout_p, seeds, route):
    """Add the gradients of A of the chosen projections, from one pass over x."""
    u = us[chosen[0]] if len(chosen) == 1 else torch.cat([us[i] for i in chosen], dim=-1)
    if seeds is not None and len(chosen) < len(projections):
        seeds = seeds[chosen]
    first = projections[chosen[0]].lora_a
    mixed = len({projections[i].lora_a.dtype for i in chosen}) > 1
    wide = lora.sum_dtype(first) if mixed else first.dtype
    das = lora.shrink_backward(
        u, x, [ranks[i] for i in chosen], first.shape[0], dropout_p, seeds, route, wide
    )
    for i, da in zip(chosen, das):
        grads[i] = grads[i]._replace(lora_a=da.to(projections[i].lora_a.dtype))
    return grads
