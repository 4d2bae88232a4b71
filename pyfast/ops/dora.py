"""The row norms that DoRA divides by, and the part of them that stays the same."""

import weakref

import torch
from torch import Tensor

from pyfast._support import checks, dtypes
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.ops.lora_arguments import unpack_weight
from pyfast.ops.registered import lora as registered


def row_squares(weight: Tensor | NF4Weight) -> Tensor:
    """Return ||W||^2 of each row: what DoRA's norm needs of a frozen weight only once.

    Args:
        weight: [out, in], of any floating dtype, or an NF4Weight of that shape.

    Returns:
        [out], float32 (float64 for a float64 weight). Pass it as `Projection.row_squares`.

    Example:
        >>> import torch, pyfast
        >>> pyfast.row_squares(torch.ones(3, 64))
        tensor([64., 64., 64.])
    """
    if not isinstance(weight, NF4Weight):
        checks.tensor("weight", weight, checks.FLOATS_AND_DOUBLE)
    if len(weight.shape) != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; a linear layer's is [out, in]")
    return registered.row_squares(*unpack_weight(weight))


class RowSquaresCache:
    """`row_squares` of a layer's weight, kept while the weight stays as it is.

    Copies and pickles of a cache are empty. Threads may use one cache at the same time, as the
    replicas of `nn.DataParallel` do, because its entry is read and replaced whole.
    """

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref, tuple, Tensor] | None = None  # parameter, key, squares

    def get(self, weight: Tensor | NF4Weight, parameter: Tensor) -> Tensor | None:
        """Return the squares, or None if nothing would tell that the weight changes.

        Args:
            weight: The weight, as ops take it; it may be a view made for this call.
            parameter: The layer's tensor that holds the weight. The squares are computed again
                when it is another object, lies elsewhere, or was written to.
        """
        tensors = [parameter, *([weight.absmax] if isinstance(weight, NF4Weight) else [])]
        if torch.compiler.is_compiling() or parameter.requires_grad:
            return None
        if any(tensor.is_inference() for tensor in tensors):  # which count no versions
            return None
        key = (parameter.dtype, parameter.device, parameter.shape)
        key += tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if (entry := self._entry) is not None:
            kept_parameter, kept_key, squares = entry
            if kept_parameter() is parameter and kept_key == key:
                return squares
        squares = row_squares(weight)
        self._entry = weakref.ref(parameter), key, squares
        return squares

    def __reduce__(self):
        return RowSquaresCache, ()


@torch.no_grad()
def dora_norm(
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    squares: Tensor | None = None,
) -> Tensor:
    """Return ||W + s B A|| of each row, without the product B A.

    Its square is ||W||^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B>. `squares` is `row_squares(weight)`,
    computed here by default.
    """
    base, shape, blocksize = unpack_weight(weight)
    dtype = dtypes.sum_dtype(lora_a)
    if not blocksize:
        dtype = torch.promote_types(dtype, weight.dtype)
    a, b = lora_a.to(dtype), lora_b.to(dtype)
    if not blocksize and weight.is_cuda and weight.dtype == torch.bfloat16:
        wa = _times_bfloat16(weight, a)  # [out, r]; on tensor cores
    else:
        wa = _times(a, base, shape, blocksize).t()
    ba = _times(b, [_times(a, [a], a.shape, 0)], (len(a), len(a)), 0)  # B (A A^T)
    squares = registered.row_squares(base, shape, blocksize) if squares is None else squares
    total = squares + 2 * scaling * (b * wa).sum(1) + scaling**2 * (ba * b).sum(1)
    return total.clamp(min=0).sqrt()


def _times_bfloat16(w: Tensor, a: Tensor) -> Tensor:
    """Return W A^T in float32 for a bf16 W and a float32 A, by tensor cores.

    A is split into its upper bits and what they leave, which bf16 holds, as its range is float32's.
    """
    high = a.to(w.dtype)
    parts = torch.stack([high, (a - high).to(w.dtype)])[:, None]
    products = registered.shrink(w, list(parts), [1.0, 1.0], 0.0, None, [])
    return products.unflatten(1, (2, len(a))).sum(1)


def _times(x: Tensor, base: list[Tensor], shape: tuple[int, int], blocksize: int) -> Tensor:
    """Return x W^T in float32, under autocast, too: the same bits on any number of threads."""
    s, lora_b = x.new_empty(len(x), 0), x.new_empty(1, shape[0], 0)  # of rank 0
    return registered.linear(x, s, base, lora_b, None, None, shape, blocksize, [])
