"""Arguments of LoRA's functions: the projection, its checks, and what is packed for the ops."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfast._support import checks, notices
from pyfast._support.seeds import seed_tensor
from pyfast.formats.nf4_weight import NF4Weight


@dataclass(frozen=True, eq=False)
class Projection:
    """A layer that `lora_linears` applies to x: a weight and one low-rank adapter.

    Args:
        weight: [out, in], of any floating dtype, or an NF4Weight of that shape, which is frozen.
        lora_a: [r, in], in float32 or x's dtype.
        lora_b: [out, r], in float32 or x's dtype.
        scaling: The factor of the low-rank half, alpha / r or alpha / sqrt(r).
        bias: [out], the layer's bias. Default: none.
        lora_bias: [out], the bias of B, which is scaled, too. Default: none.
        magnitude: [out], DoRA's magnitude. Default: plain LoRA.
        row_squares: [out], `pyfast.row_squares(weight)`, which saves DoRA a pass over a frozen
            weight. Default: computed at each call.

    Example:
        >>> import torch, pyfast
        >>> x, weight = torch.randn(5, 64), torch.randn(128, 64)
        >>> a, b = torch.randn(4, 64), torch.zeros(128, 4)
        >>> (y,) = pyfast.lora_linears(x, [pyfast.Projection(weight, a, b, scaling=2.0)])
        >>> y.shape
        torch.Size([5, 128])
    """

    weight: Tensor | NF4Weight
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    lora_bias: Tensor | None = None
    magnitude: Tensor | None = None
    row_squares: Tensor | None = None


# --- checks ---


def check_projection(
    x: Tensor, dtype: torch.dtype, projection: Projection, adapters: int | None = None
) -> tuple[Tensor, ...]:
    """Raise unless the projection fits x; return the tensors of its base.

    `dtype` is what x is computed in. With `adapters`, lora_a and lora_b hold that many, stacked.
    """
    if not isinstance(projection.weight, NF4Weight):
        checks.tensor("weight", projection.weight, checks.FLOATS_AND_DOUBLE)
    base, shape, _ = unpack_weight(projection.weight)
    if len(shape) != 2:
        raise ValueError(f"weight has shape {list(shape)}; a linear layer's is [out, in]")
    if x.device.type == "cpu" and not base[0].is_contiguous() and not torch.compiler.is_compiling():
        notices.warn_once(
            "on the CPU a weight that is not contiguous, such as a Conv1D's, "
            "is copied at every call"
        )
    checks.last_dim("x", x, shape[1], "the in_features of weight")
    checks.finite_number("scaling", projection.scaling)
    _check_shapes(projection, shape, () if adapters is None else (adapters,))
    _check_devices_and_dtypes(x, dtype, projection, base[0])
    return tuple(base)


def _check_shapes(projection: Projection, shape: tuple[int, int], stack: tuple[int, ...]) -> None:
    out, in_features = shape
    lora_a, lora_b = projection.lora_a, projection.lora_b
    checks.tensor("lora_a", lora_a, checks.FLOATS_AND_DOUBLE)
    rank = lora_a.shape[-2] if lora_a.dim() >= 2 else -1
    if lora_a.dim() != 2 + len(stack) or lora_a.shape[-1] != in_features:
        raise ValueError(
            f"lora_a has shape {list(lora_a.shape)}; "
            f"it must be {[*stack, 'r', in_features]}, r the rank"
        )
    checks.tensor("lora_b", lora_b, checks.FLOATS_AND_DOUBLE)
    checks.shape("lora_b", lora_b, (*stack, out, rank))
    for name, vector in _vectors(projection).items():
        if vector is not None:
            checks.tensor(name, vector, checks.FLOATS_AND_DOUBLE)
            checks.shape(name, vector, (out,))


def _check_devices_and_dtypes(
    x: Tensor, dtype: torch.dtype, projection: Projection, base: Tensor
) -> None:
    matrices = {"weight": base, "lora_a": projection.lora_a, "lora_b": projection.lora_b}
    tensors = matrices | _vectors(projection)
    for name, tensor in tensors.items():
        if tensor is not None:
            checks.same_device(name, tensor, "x", x.device)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64 != x.dtype:
            raise TypeError(
                f"{name} is torch.float64 but x is {x.dtype}; float64 takes all of them, or none"
            )
    for name in ("lora_a", "lora_b"):
        if tensors[name].dtype not in (torch.float32, x.dtype, dtype):
            raise TypeError(
                f"{name} is {tensors[name].dtype}; it must be torch.float32 or x's dtype, {x.dtype}"
            )


def _vectors(projection: Projection) -> dict[str, Tensor | None]:
    return {
        "bias": projection.bias,
        "lora_bias": projection.lora_bias,
        "magnitude": projection.magnitude,
        "row_squares": projection.row_squares,
    }


# --- what the ops take ---


def unpack_weight(weight: Tensor | NF4Weight) -> tuple[list[Tensor], tuple[int, int], int]:
    """Return the tensors of a base, its shape and its blocksize, which is 0 for a dense weight."""
    if isinstance(weight, NF4Weight):
        return weight.state, weight.shape, weight.blocksize
    return [weight], tuple(weight.shape), 0


def bias_dtype(bias: Tensor, compute: torch.dtype) -> torch.dtype:
    """Return the dtype to pass the bias in: its own if that is float32 or the compute dtype.

    Otherwise it is the compute dtype. The kernel adds the bias before the only rounding.
    """
    return bias.dtype if bias.dtype in (compute, torch.float32) else compute


def make_seeds(x: Tensor, seeds, count: int) -> Tensor:
    """Return the seeds of `count` dropout masks, int64 [count] on x's device; None: new ones."""
    if seeds is None:
        return torch.randint(2**63 - 1, (count,), device=x.device)
    if not isinstance(seeds, Tensor):
        if len(seeds) != count:
            raise ValueError(
                f"seeds are {len(seeds)}; there must be one for each of {count} projections"
            )
        seeds = torch.stack([seed_tensor(x, seed) for seed in seeds])
    if seeds.dtype != torch.int64 or seeds.shape != (count,):
        raise ValueError(
            f"seed is {seeds.dtype} {list(seeds.shape)}; it must be int64, one for each projection"
        )
    return seeds.to(x.device)


def make_scales(scaling: float | Sequence[float] | Tensor, n: int, device: torch.device) -> Tensor:
    """Return the scales of n adapters, float32 [n], from one number or one for each."""
    if isinstance(scaling, Tensor):
        return _scales_from_tensor(scaling, n, device)
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
        checks.finite_number("scaling", value)
    return torch.tensor(values, dtype=torch.float32, device=device)


def _scales_from_tensor(scaling: Tensor, n: int, device: torch.device) -> Tensor:
    if scaling.requires_grad:
        raise ValueError("scaling requires grad; it gets none: detach it")
    can_read = scaling.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_read and not bool(scaling.isfinite().all()):
        raise ValueError(f"scaling is {scaling.tolist()}; it must be finite")
    if scaling.numel() not in (1, n):
        raise ValueError(
            f"scaling has {scaling.numel()} elements; "
            f"it must have 1, or one for each of {n} adapters"
        )
    return scaling.detach().to(device, torch.float32).reshape(-1).expand(n).contiguous()


def make_route(x: Tensor, ids: Tensor, scales: Tensor, n: int) -> list[Tensor]:
    """Sort rows by adapter. Return the row order, the first row of each adapter, and the scales.

    The rows of an adapter stay in their order. Those without one, of id -1, come first.
    """
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
