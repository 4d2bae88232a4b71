r"""LoRA: a linear layer and its low-rank update as one op, over a dense or an NF4 weight.

    y = g (x W^T + s (drop(x) A^T B^T + lora_bias)) + bias
        g = 1, or with DoRA magnitude / ||W + s B A||

    S  = s drop(x) A^T              lora_shrink            one pass over x for all projections
    y  = g (x W^T + S B^T) + bias   lora_linear            S B^T is r more columns of the sum
    U  = s (g dy) B, dB, sums       lora_expand_backward   one pass over dy
    dx = (g dy) W + mask (U A)      lora_linear_backward
    dA = U^T drop(x)                lora_shrink_backward

The backward keeps x, S, and, for DoRA's magnitude, z = y before g and bias. The dropout mask is
Philox(seed, row, column), recomputed where it is needed.

`pyfast/reference/_lora.py` is the specification.
"""

from collections.abc import Sequence

from torch import Tensor

from pyfast import reference
from pyfast._support import checks, dtypes
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.ops.dora import dora_norm
from pyfast.ops.lora_arguments import (
    Projection,
    bias_dtype,
    check_projection,
    make_route,
    make_scales,
    make_seeds,
    unpack_weight,
)
from pyfast.ops.lora_autograd import (
    LoRALinears,
    ProjectionSpec,
    ProjectionTensors,
    flatten,
    project,
)
from pyfast.ops.registered import lora as registered


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
    """Return g (x W^T + scaling (drop(x) A^T B^T + lora_bias)) + bias.

    Differentiable in every floating tensor.

    Args:
        x: [..., in], float32, bfloat16 or float16 (and float64). Autocast applies.
        weight: [out, in], of any floating dtype, or an NF4Weight of that shape, which is frozen.
        lora_a: [r, in], in float32 or x's dtype. x is never cast to it.
        lora_b: [out, r], in float32 or x's dtype.
        scaling: alpha / r, or alpha / sqrt(r).
        bias: [out], the layer's bias. Default: none.
        lora_bias: [out], the bias of B, which is scaled, too. Default: none.
        dropout_p: The probability of drop(x), to the nearest 2^-16. With DoRA only the low-rank
            half sees the dropped x; in PEFT the base half does, too.
        seed: The seed of the dropout mask. Default: a new one from torch's generator.
        magnitude: [out], for DoRA: g = magnitude / ||W + scaling B A||, a norm for each row, which
            is a constant to autograd. Default: g = 1.

    Returns:
        [..., out], in the dtype of x or of autocast.

    Example:
        >>> import torch, pyfast
        >>> x, weight = torch.randn(2, 5, 64), pyfast.nf4_quantize(torch.randn(128, 64))
        >>> a, b = torch.randn(4, 64), torch.zeros(128, 4, requires_grad=True)
        >>> y = pyfast.lora_linear(x, weight, a, b, scaling=2.0)
        >>> y.sum().backward()
        >>> y.shape, b.grad.shape
        (torch.Size([2, 5, 128]), torch.Size([128, 4]))
    """
    projection = Projection(weight, lora_a, lora_b, scaling, bias, lora_bias, magnitude)
    seeds = None if seed is None else [seed]
    return lora_linears(x, [projection], dropout_p=dropout_p, seeds=seeds)[0]


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    dropout_p: float = 0.0,
    seeds: Sequence[int | Tensor] | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Apply `lora_linear` of layers that share x, such as q, k, v, or gate and up.

    One pass over x computes S of all layers, and none is needed to add up their dx.

    Args:
        x: [..., in], as `lora_linear` takes it.
        projections: The layers, at least one.
        dropout_p: The probability of drop(x). Each layer has a mask of its own.
        seeds: The seeds of the masks, one for each layer. Default: new ones from torch's generator.

    Returns:
        [..., out] for each layer.

    Example:
        >>> import torch, pyfast
        >>> def layer(out):
        ...     a, b = torch.randn(4, 64), torch.zeros(out, 4)
        ...     return pyfast.Projection(torch.randn(out, 64), a, b, scaling=2.0)
        >>> q, k, v = pyfast.lora_linears(torch.randn(5, 64), [layer(64), layer(16), layer(16)])
        >>> q.shape, k.shape
        (torch.Size([5, 64]), torch.Size([5, 16]))
    """
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    if not projections:
        raise ValueError("projections is empty; it must hold at least one")
    checks.probability("dropout_p", dropout_p)
    dtype = dtypes.compute_dtype(x)
    bases = [check_projection(x, dtype, projection) for projection in projections]
    has_dropout = reference.dropout_threshold(dropout_p) > 0
    seeds = make_seeds(x, seeds, len(projections)) if has_dropout else None
    specs, packed = [], []
    for p, base in zip(projections, bases):
        norm = None
        if p.magnitude is not None:
            norm = dora_norm(p.weight, p.lora_a, p.lora_b, p.scaling, p.row_squares)
        bias = None if p.bias is None else p.bias.to(bias_dtype(p.bias, dtype))
        packed.append(
            ProjectionTensors(
                p.lora_a[None], p.lora_b[None], bias, p.lora_bias, p.magnitude, norm, base
            )
        )
        specs.append(_spec_of(p))
    return _apply(x.to(dtype), float(dropout_p), seeds, specs, packed, [])


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
    """Apply a linear layer with one of n adapters for each row of x.

    y_i = W x_i + scaling[id] B[id] A[id] x_i + bias with id = adapter_ids[i]. Differentiable as
    `lora_linear` is.

    Args:
        x: [..., in], as `lora_linear` takes it.
        weight: [out, in], dense or an NF4Weight.
        lora_a: [n, r, in]. An adapter of a smaller rank is padded with zeros.
        lora_b: [n, out, r].
        adapter_ids: x.shape[:-1], integers from -1, for no adapter, to n - 1.
        scaling: One number for all adapters, or one for each.
        bias: [out]. Default: none.

    Returns:
        [..., out], in the dtype of x or of autocast.

    Example:
        >>> import torch, pyfast
        >>> x, weight = torch.randn(3, 64), torch.randn(128, 64)
        >>> a, b = torch.randn(2, 4, 64), torch.randn(2, 128, 4)
        >>> ids = torch.tensor([1, -1, 0])
        >>> pyfast.multi_lora_linear(x, weight, a, b, adapter_ids=ids, scaling=2.0).shape
        torch.Size([3, 128])
    """
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    checks.tensor("lora_a", lora_a, checks.FLOATS_AND_DOUBLE)
    if lora_a.dim() != 3:
        raise ValueError(f"lora_a has shape {list(lora_a.shape)}; it must be [adapters, rank, in]")
    dtype, n = dtypes.compute_dtype(x), len(lora_a)
    projection = Projection(weight, lora_a, lora_b, 1.0, bias)  # the route holds the scales
    base = check_projection(x, dtype, projection, adapters=n)
    route = make_route(x, adapter_ids, make_scales(scaling, n, x.device), n)
    bias = None if bias is None else bias.to(bias_dtype(bias, dtype))
    packed = ProjectionTensors(lora_a, lora_b, bias, None, None, None, base)
    return _apply(x.to(dtype), 0.0, None, [_spec_of(projection)], [packed], route)[0]


def _spec_of(projection: Projection) -> ProjectionSpec:
    base, shape, blocksize = unpack_weight(projection.weight)
    return ProjectionSpec(float(projection.scaling), shape, blocksize, len(base))


def _apply(
    x: Tensor,
    dropout_p: float,
    seeds: Tensor | None,
    specs: Sequence[ProjectionSpec],
    packed: Sequence[ProjectionTensors],
    route: list[Tensor],
) -> tuple[Tensor, ...]:
    """Run the ops, through autograd if anything needs a gradient."""
    flat = flatten(packed)
    if dtypes.needs_graph(x, *flat):
        return LoRALinears.apply(x, dropout_p, seeds, tuple(specs), len(route), *route, *flat)
    lora_a = [tensors.lora_a for tensors in packed]
    scaling = [spec.scaling for spec in specs]
    s = registered.shrink(x, lora_a, scaling, dropout_p, seeds, route)  # [.., sum of ranks]
    outputs = []
    for spec, tensors, s_part in zip(specs, packed, s.split([a.shape[1] for a in lora_a], dim=-1)):
        outputs.append(project(spec, tensors, x, s_part, route, keep_unscaled=False)[0])
    return tuple(outputs)


# --- DoRA's norm ---
