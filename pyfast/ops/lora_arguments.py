"""The arguments of LoRA's functions, and their checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfast._support import checks, notices
from pyfast._support import seeds as _support_seeds
from pyfast.formats.nf4_weight import NF4Weight


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
            raise ValueError(
                f"seeds are {len(seeds)}; there must be one for each of {count} projections"
            )
        seeds = torch.stack([_support_seeds.seed_tensor(x, seed) for seed in seeds])
    if seeds.dtype != torch.int64 or seeds.shape != (count,):
        raise ValueError(
            f"seed is {seeds.dtype} {list(seeds.shape)}; it must be int64, one for each projection"
        )
    return seeds.to(x.device)


def _scales(scaling, n: int, device) -> Tensor:
    if isinstance(scaling, Tensor):
        if scaling.requires_grad:
            raise ValueError("scaling requires grad; it gets none: detach it")
        if (
            scaling.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not bool(scaling.isfinite().all())
        ):
            raise ValueError(f"scaling is {scaling.tolist()}; it must be finite")
        if scaling.numel() not in (1, n):
            raise ValueError(
                f"scaling has {scaling.numel()} elements; it must have 1, or one for each of {n} adapters"
            )
        return scaling.detach().to(device, torch.float32).reshape(-1).expand(n).contiguous()
    if not isinstance(scaling, int | float | Sequence) or isinstance(scaling, str):
        raise TypeError(
            f"scaling must be a number, numbers or a tensor, not {type(scaling).__name__}"
        )
    values = [scaling] * n if isinstance(scaling, int | float) else list(scaling)
    if len(values) != n:
        raise ValueError(
            f"scaling has {len(values)} elements; it must have 1, or one for each of {n} adapters"
        )
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
        torch._assert_async(
            ((ids >= -1) & (ids < n)).all(), f"adapter_ids must hold -1, for none, to {n - 1}"
        )
    order = torch.argsort(ids, stable=True)
    starts = torch.searchsorted(ids[order], torch.arange(n + 1, device=x.device))
    return [order.to(torch.int32), starts.to(torch.int32), scales]


def _check_probability(p: float) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise ValueError(
            f"dropout_p is {p!r}; it must be a number from 0 up to, but not including, 1"
        )


def _check_scaling(scaling: float) -> None:
    if (
        isinstance(scaling, bool)
        or not isinstance(scaling, int | float)
        or not -math.inf < scaling < math.inf
    ):
        raise ValueError(f"scaling is {scaling!r}; it must be a finite number")


def _check_projection(
    x: Tensor, dtype: torch.dtype, p: Projection, adapters: int | None = None
) -> tuple[Tensor, ...]:
    """The tensors of its base, all that is wrong with it having been said."""
    if not isinstance(p.weight, NF4Weight):
        checks.tensor("weight", p.weight, checks.FLOATS_AND_DOUBLE)
    base, shape, _ = _base_of(p.weight)
    if len(shape) != 2:
        raise ValueError(f"weight has shape {list(shape)}; a linear layer's is [out, in]")
    if x.device.type == "cpu" and not base[0].is_contiguous() and not torch.compiler.is_compiling():
        notices.warn_once(
            "on the CPU a weight that is not contiguous, such as a Conv1D's, is copied at every call"
        )
    out, into = shape
    checks.last_dim("x", x, into, "the in_features of weight")
    _check_scaling(p.scaling)
    lead = () if adapters is None else (adapters,)
    checks.tensor("lora_a", p.lora_a, checks.FLOATS_AND_DOUBLE)
    rank = p.lora_a.shape[-2] if p.lora_a.dim() >= 2 else -1
    if p.lora_a.dim() != 2 + len(lead) or p.lora_a.shape[-1] != into:
        raise ValueError(
            f"lora_a has shape {list(p.lora_a.shape)}; it must be {[*lead, 'r', into]}, r the rank"
        )
    checks.tensor("lora_b", p.lora_b, checks.FLOATS_AND_DOUBLE)
    checks.shape("lora_b", p.lora_b, (*lead, out, rank))
    vectors = {
        "bias": p.bias,
        "lora_bias": p.lora_bias,
        "magnitude": p.magnitude,
        "row_squares": p.row_squares,
    }
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
            raise TypeError(
                f"{name} is torch.float64 but x is {x.dtype}; float64 takes all of them, or none"
            )
    for name in ("lora_a", "lora_b"):
        if others[name].dtype not in (torch.float32, x.dtype, dtype):
            raise TypeError(
                f"{name} is {others[name].dtype}; it must be torch.float32 or x's dtype, {x.dtype}"
            )
    return tuple(base)
