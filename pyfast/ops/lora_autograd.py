"""The autograd Function of LoRA's linear layers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfast._support.dtypes import sum_dtype
from pyfast.ops.registered import lora as registered


class ProjectionSpec(NamedTuple):
    """Numbers of a projection."""

    scaling: float
    shape: tuple[int, int]
    blocksize: int
    base_tensors: int


class ProjectionTensors(NamedTuple):
    """Tensors of a projection, or for each whether it needs a gradient, or its gradient."""

    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None
    lora_bias: Tensor | None
    magnitude: Tensor | None
    norm: Tensor | None
    base: tuple[Tensor | None, ...]


def flatten(projections: Sequence[ProjectionTensors]) -> list[Tensor | None]:
    """Return the fields of all projections in one list."""
    flat = []
    for tensors in projections:
        flat += [*tensors[:-1], *tensors.base]
    return flat


def _unflatten(specs: Sequence[ProjectionSpec], flat: Sequence) -> list[ProjectionTensors]:
    projections, first, fields = [], 0, len(ProjectionTensors._fields) - 1
    for spec in specs:
        base, end = first + fields, first + fields + spec.base_tensors
        projections.append(ProjectionTensors(*flat[first:base], tuple(flat[base:end])))
        first = end
    return projections


def project(
    spec: ProjectionSpec,
    tensors: ProjectionTensors,
    x: Tensor,
    s: Tensor,
    route: Sequence[Tensor],
    keep_unscaled: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return y and None, from one op; or y and z if DoRA's magnitude trains.

    Then z = x W^T + S B^T + s lora_bias, and y = g z + bias.
    """
    gain, bias = _gain(tensors), tensors.bias
    added = _scaled_lora_bias(tensors, spec.scaling)
    base, options = (tensors.base, tensors.lora_b), (spec.shape, spec.blocksize, route)
    if keep_unscaled:
        z = registered.linear(x, s, *base, added, None, *options)
        y = z * gain if bias is None else z * gain + bias
        # Not in place, and no `to` without effect: torch 2.11 compiles these to zero gradients.
        return y if y.dtype == x.dtype else y.to(x.dtype), z
    if added is not None:
        added = added if gain is None else added * gain
        bias = added if bias is None else added + bias
    return registered.linear(x, s, *base, bias, gain, *options), None


def _gain(tensors: ProjectionTensors) -> Tensor | None:
    if tensors.magnitude is None:
        return None
    return tensors.magnitude.to(tensors.norm.dtype) / tensors.norm


def _scaled_lora_bias(tensors: ProjectionTensors, scaling: float) -> Tensor | None:
    lora_bias = tensors.lora_bias
    return None if lora_bias is None else lora_bias.to(sum_dtype(lora_bias)) * scaling


class LoRALinears(torch.autograd.Function):
    """Projections that share x.

    `route` is [], or the three tensors of a batch of several adapters.
    """

    @staticmethod
    def forward(ctx, x, dropout_p, seeds, specs, route_size, *flat):
        route, flat = flat[:route_size], flat[route_size:]
        projections = _unflatten(specs, flat)
        needs = _unflatten(specs, ctx.needs_input_grad[5 + route_size :])
        rows = x.contiguous()  # once for all ops
        lora_a = [tensors.lora_a for tensors in projections]
        s = registered.shrink(  # [.., sum of ranks]
            rows, lora_a, [spec.scaling for spec in specs], dropout_p, seeds, route
        )
        s_parts = s.split([a.shape[1] for a in lora_a], dim=-1)
        outputs, unscaled = [], []
        for spec, tensors, s_part, need in zip(specs, projections, s_parts, needs):
            y, z = project(spec, tensors, rows, s_part, route, keep_unscaled=need.magnitude)
            outputs.append(y)
            unscaled.append(z)
        keep_x = any(need.lora_a or any(need.base) for need in needs)
        keep_s = any(need.lora_b for need in needs)
        ctx.dropout_p, ctx.specs, ctx.route_size, ctx.left = dropout_p, specs, route_size, None
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if keep_x else None, s if keep_s else None, seeds, *route, *unscaled, *flat
        )
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, s, seeds, *rest = _saved_tensors(ctx, dys)
        route, rest = rest[: ctx.route_size], rest[ctx.route_size :]
        unscaled, flat = rest[: len(dys)], rest[len(dys) :]
        projections = _unflatten(ctx.specs, flat)
        needs = _unflatten(ctx.specs, ctx.needs_input_grad[5 + ctx.route_size :])
        ranks = [tensors.lora_a.shape[1] for tensors in projections]
        s_parts = [None] * len(dys) if s is None else s.split(ranks, dim=-1)
        dx, us, grads = None, [], []
        for i, (spec, tensors, need, dy) in enumerate(zip(ctx.specs, projections, needs, dys)):
            if dy is None:
                us.append(None)
                grads.append(ProjectionTensors(*[None] * 6, (None,) * spec.base_tensors))
                continue
            dy, gain = dy.contiguous(), _gain(tensors)
            needs_x, s_part, z = ctx.needs_input_grad[0], s_parts[i], unscaled[i]
            u, grad = _backward_of_one(spec, tensors, need, dy, s_part, z, x, gain, route, needs_x)
            if needs_x:
                seed = None if seeds is None else seeds[i]
                base = tensors.base, tensors.lora_a
                options = spec.shape, spec.blocksize, ctx.dropout_p, seed, route
                dx = registered.linear_backward(dy, u, *base, gain, dx, *options)
            us.append(u)
            grads.append(grad)
        _add_lora_a(grads, us, x, projections, needs, ctx.dropout_p, seeds, route)
        return dx, None, None, None, None, *(None for _ in route), *flatten(grads)


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


def _backward_of_one(spec, tensors, need, dy, s, z, x, gain, route, needs_x):
    """Return U, if anything needs it, and the gradients that one pass over dy gives."""
    needs_bias = need.bias or need.lora_bias
    needs_output = [needs_x or need.lora_a, need.lora_b, needs_bias, need.magnitude]
    u = db = dbias = dlora_bias = dmagnitude = None
    if any(needs_output):
        if s is None:
            s = dy.new_empty(*dy.shape[:-1], tensors.lora_b.shape[2], dtype=sum_dtype(dy))
        u, db, total, weighted_total = registered.expand_backward(
            dy, s, tensors.lora_b, gain, z, spec.scaling, route, needs_output
        )
        if need.magnitude:
            dmagnitude = (weighted_total / tensors.norm).to(tensors.magnitude.dtype)
        if need.lora_bias:
            factor = 1 if gain is None else gain
            dlora_bias = (total * spec.scaling * factor).to(tensors.lora_bias.dtype)
        dbias = total.to(tensors.bias.dtype) if need.bias else None
        db = db if need.lora_b else None
    dbase = []
    for weight, need_weight in zip(tensors.base, need.base):
        dbase.append(_dense_gradient(dy, gain, x, weight) if need_weight else None)
    return u, ProjectionTensors(None, db, dbias, dlora_bias, dmagnitude, None, tuple(dbase))


def _dense_gradient(dy: Tensor, gain: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    dy = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    dw = dy.t() @ x.reshape(len(dy), x.shape[-1])
    return (dw if gain is None else dw * gain[:, None]).to(weight.dtype)


def _add_lora_a(grads, us, x, projections, needs, dropout_p, seeds, route) -> None:
    """Add to `grads` the gradients of all A that need one, from one pass over x."""
    chosen = [i for i, need in enumerate(needs) if need.lora_a and us[i] is not None]
    if not chosen:
        return
    u = us[chosen[0]] if len(chosen) == 1 else torch.cat([us[i] for i in chosen], dim=-1)
    if seeds is not None and len(chosen) != len(needs):
        seeds = seeds[chosen]
    lora_a = [projections[i].lora_a for i in chosen]
    has_mixed_dtypes = len({a.dtype for a in lora_a}) > 1
    dtype = sum_dtype(lora_a[0]) if has_mixed_dtypes else lora_a[0].dtype
    ranks = [a.shape[1] for a in lora_a]
    results = registered.shrink_backward(
        u, x, ranks, lora_a[0].shape[0], dropout_p, seeds, route, dtype
    )
    for i, a, da in zip(chosen, lora_a, results):
        grads[i] = grads[i]._replace(lora_a=da.to(a.dtype))
