r"""NF4: linear layers whose frozen weight takes 4 bits a value.

    W[i] = code[nibble[i]] * scale[i // blocksize]          one float32 product, rounded once
    y    = x W^T + bias,      dx = dy W

The forward and the backward decode W tile by tile. For many rows on a GPU they decode panels of
some 128 MB, and no fewer than 128 columns or a block of them. A 16-bit copy of a weight is never
kept, nor ever made of a large one.

`pyfast/reference/_nf4.py` is the specification.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfast._support import checks, dtypes
from pyfast.formats import nf4_codebooks
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.ops.registered import nf4 as registered
from pyfast.ops.registered.nf4 import Shape, State

# --- the autograd Function ---


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, shape, blocksize, *state):
        ctx.save_for_backward(*state)
        ctx.shape, ctx.blocksize = shape, blocksize
        return registered.linear(x, state, bias, shape, blocksize)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        state = ctx.saved_tensors  # read once, because activation checkpointing recomputes them
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = registered.linear_backward(dy, state, ctx.shape, ctx.blocksize)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(dy.shape[:-1].numel(), ctx.shape[0]).sum(0)
        return dx, dbias, None, None, *(None for _ in state)


# --- the functions ---


def nf4_quantize(
    weight: Tensor, *, blocksize: int = 64, nested: bool = True, quant_type: str = "nf4"
) -> NF4Weight:
    """Quantize a tensor to 4 bits a value, byte for byte as bitsandbytes does.

    Args:
        weight: Any shape, float32, bfloat16 or float16. All values must be finite.
        blocksize: How many values share a scale: a power of two, 32 to 4096.
        nested: Whether to quantize the scales to 8 bits, too. At blocksize 64 a value then takes
            4.13 bits instead of 4.5.
        quant_type: "nf4" for weights, which are normally distributed, or "fp4".

    Returns:
        The packed weight with its scales and its code.

    Raises:
        ValueError: The weight holds NaN or infinite values.

    Example:
        >>> import torch, pyfast
        >>> w = pyfast.nf4_quantize(torch.randn(128, 64))
        >>> w.packed.shape, w.shape
        (torch.Size([4096, 1]), (128, 64))
    """
    checks.tensor("weight", weight, checks.FLOATS)
    check_format(blocksize, nested, quant_type)
    device = weight.device
    tables = (
        nf4_codebooks.THRESHOLDS[quant_type],
        nf4_codebooks.ORDER[quant_type],
        nf4_codebooks.NESTED_THRESHOLDS,
    )
    packed, absmax, nested_absmax, offset = registered.quantize(
        weight.detach(), *(table.to(device) for table in tables), blocksize, nested
    )
    code = nf4_codebooks.CODE[quant_type].to(device, copy=True)
    extra = {}
    if nested:
        nested_code = nf4_codebooks.NESTED_CODE.to(device, copy=True)
        extra = {"nested_absmax": nested_absmax, "nested_code": nested_code, "offset": offset}
    return NF4Weight(
        packed, absmax, code, weight.shape, blocksize, weight.dtype, quant_type, **extra
    )


def nf4_dequantize(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Return the values of a quantized weight as a dense tensor.

    Args:
        w: The quantized weight.
        dtype: float32, bfloat16 or float16. Default: the dtype the weight was quantized from.

    Returns:
        A tensor of w's shape.

    Example:
        >>> import torch, pyfast
        >>> w = pyfast.nf4_quantize(torch.randn(128, 64))
        >>> pyfast.nf4_dequantize(w, torch.bfloat16).shape
        torch.Size([128, 64])
    """
    checks.instance("w", w, NF4Weight)
    dtype = w.dtype if dtype is None else dtype
    checks.one_of("dtype", dtype, checks.FLOATS)
    return registered.dequantize(w.state, w.shape, w.blocksize, dtype)


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias with W in 4 bits. Differentiable in x and bias; W is frozen.

    Args:
        x: [..., in], float32, bfloat16 or float16 (and float64 on the CPU). Autocast applies.
        w: A quantized weight of shape (out, in).
        bias: [out], in x's dtype. Default: none.

    Returns:
        [..., out], in the dtype of x or of autocast.

    Example:
        >>> import torch, pyfast
        >>> w = pyfast.nf4_quantize(torch.randn(128, 64))
        >>> pyfast.nf4_linear(torch.randn(2, 5, 64), w).shape
        torch.Size([2, 5, 128])
    """
    checks.instance("w", w, NF4Weight)
    check_matrix(w)
    return nf4_linear_from_state(x, w.state, bias, w.shape, w.blocksize)


def nf4_linear_from_state(
    x: Tensor, state: State, bias: Tensor | None, shape: Shape, blocksize: int
) -> Tensor:
    """Return `nf4_linear` of a weight whose tensors, shape and blocksize were checked before."""
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    checks.last_dim("x", x, shape[1], "the in_features of w")
    checks.same_device("x", x, "w", state[0].device)
    dtype = dtypes.compute_dtype(x)
    if bias is not None:
        checks.tensor("bias", bias, checks.FLOATS_AND_DOUBLE)
        checks.shape("bias", bias, (shape[0],))
        checks.same_device("bias", bias, "x", x.device)
        if dtype == x.dtype:
            checks.same_dtype("bias", bias, "x", x)
        bias = bias.to(dtype)
    x = x.to(dtype)
    if dtypes.needs_graph(x, bias):
        return _NF4Linear.apply(x, bias, shape, blocksize, *state)
    return registered.linear(x, state, bias, shape, blocksize)


# --- checks ---


def check_format(blocksize: int, nested: bool, quant_type: str) -> None:
    """Raise unless these options of `nf4_quantize` are valid."""
    checks.instance("blocksize", blocksize, int)
    checks.one_of("blocksize", blocksize, nf4_codebooks.BLOCKSIZES)
    checks.instance("nested", nested, bool)
    checks.one_of("quant_type", quant_type, nf4_codebooks.QUANT_TYPES)


def check_matrix(w: NF4Weight) -> None:
    """Raise unless the weight is that of a linear layer."""
    if len(w.shape) != 2:
        raise ValueError(f"w has shape {list(w.shape)}; a linear layer's is [out, in]")
