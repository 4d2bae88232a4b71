"""Bottleneck adapters on a GPU: y = residual + scaling * (act(x Wd^T + bd) Wu^T + bu), and the
gradients.

Three launches forward: z = x Wd^T, in parts of `in` so that few rows keep all of a GPU busy; h =
act of the parts' sum, which is small; and the product with Wu. One kernel does all products. Sums
are in fp32; 16-bit products round hidden values, slopes and fp32 parameters to x's type on their
way to the tensor cores. Splits are added up in a fixed order: same inputs, same bits.
"""

import torch
import triton
import triton.language as tl

from ._launch import cdiv
from .nf4_linear import sum_parts

HIDDEN_BLOCK = 512
OPTIONS = dict(enable_fp_fusion=True)  # said, because Triton 3.10 turns the default around


# ---------------------------------------------------------------- kernels


@triton.jit
def _tanh(z):
    size = tl.abs(z)
    e = tl.exp(-2 * size)
    square = z * z
    series = -0.05396825397 + square * 0.02186948854
    series = 1 + square * (-0.33333333333 + square * (0.13333333333 + square * series))
    far = (1 - e) / (1 + e)
    return tl.where(size < 0.3, z * series, tl.where(z < 0, -far, far))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """act(z) and act'(z)."""
    if ACTIVATION == "relu":
        value = tl.where(z <= 0, 0.0, z)  # of NaN, NaN
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(z * 0.70710678119))
        value = z * below
        slope = below + z * 0.39894228040 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        t = _tanh(0.79788456080 * (z + 0.044715 * z * z * z))
        value = 0.5 * z * (1 + t)
        slope = 0.5 * (1 + t) + 0.39894228040 * z * (1 - t * t) * (1 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-z))
        value = z * s
        slope = s * (1 + z * (1 - s))
    else:
        value = _tanh(z)
        slope = 1 - value * value
    return value, slope


@triton.jit
def _tile(ptr, row, col, row_stride, col_stride, rows, cols, T: tl.constexpr):
    """A tile of a matrix in type T, 0 outside it."""
    offset = row.to(tl.int64)[:, None] * row_stride + col.to(tl.int64)[None, :] * col_stride
    return tl.load(ptr + offset, mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0).to(
        T
    )


@triton.jit
def _sum_of(parts_ptr, i, inside, splits, numel):
    acc = tl.zeros([i.shape[0]], tl.float32)
    for _ in range(splits):
        acc += tl.load(parts_ptr + i, mask=inside, other=0.0)
        parts_ptr += numel
    return acc


@triton.jit
def _hidden_kernel(
    z_ptr,
    dh_ptr,
    bias_ptr,
    h_ptr,
    dz_ptr,
    numel,
    bottleneck,
    z_splits,
    dh_splits,
    scaling,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h = act(z) and dz = scaling * dh act'(z), of z = bias + the sum of its parts, and dh
    likewise; either if written.

    Grid: tiles of BLOCK of the M x bottleneck elements; a program owns one.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    z = _sum_of(z_ptr, i, inside, z_splits, numel)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + i % bottleneck, mask=inside, other=0.0).to(tl.float32)
    h, slope = _activate(z, ACTIVATION)
    if h_ptr is not None:
        tl.store(h_ptr + i, h.to(h_ptr.dtype.element_ty), mask=inside)
    if dz_ptr is not None:
        dh = scaling * _sum_of(dh_ptr, i, inside, dh_splits, numel)
        dz = tl.where(z <= 0, 0.0, dh) if ACTIVATION == "relu" else dh * slope
        tl.store(dz_ptr + i, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    residual_ptr,
    c_ptr,
    m,
    n,
    k,
    a_row,
    a_col,
    b_row,
    b_col,
    scaling,
    steps,
    T: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """c = residual + scaling * (a[m, k] b[k, n] + bias). Grid: (tiles of M, of N, splits of K,
    `steps` tiles each).

    With more than one split c is fp32 [splits, m, n], to be added up.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(k, BK))):
        inner = step * BK + tl.arange(0, BK)
        a = _tile(a_ptr, row, inner, a_row, a_col, m, k, T)
        b = _tile(b_ptr, inner, col, b_row, b_col, k, n, T)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
    acc *= scaling
    if residual_ptr is not None:
        acc += _tile(residual_ptr, row, col, n, 1, m, n, tl.float32)
    offset = split.to(tl.int64) * m * n + row.to(tl.int64)[:, None] * n + col[None, :]
    tl.store(
        c_ptr + offset, acc.to(c_ptr.dtype.element_ty), mask=(row < m)[:, None] & (col < n)[None, :]
    )


# ---------------------------------------------------------------- launchers


def product_config(m: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """The tiles of a product with m rows and a sum over k, num_warps and num_stages."""
    if dtype == torch.float32:  # no tensor cores: small tiles, all in registers
        return dict(BM=16 if m <= 16 else 32, BN=32, BK=32, num_warps=4, num_stages=2)
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    return dict(
        BM=rows, BN=64, BK=64, num_warps=4, num_stages=3 if k > 256 else 1
    )  # a few steps: nothing to pipeline


def adapter(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    residual: torch.Tensor,
    activation: str,
    scaling: float,
) -> torch.Tensor:
    """y[M, out] in residual's dtype; all contiguous."""
    y = torch.empty_like(residual)
    if y.numel() == 0:
        return y
    h, _ = _hidden(x, down_weight, down_bias, None, up_weight, activation, scaling, True)
    return _product(h, up_weight.t(), y, x.dtype, scaling, up_bias, residual)


def adapter_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    residual_is_x: bool,
    activation: str,
    scaling: float,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """The gradients of x, down_weight, down_bias, up_weight and up_bias; not needed: empty. All contiguous."""
    need_x, need_down, need_down_bias, need_up, need_up_bias = needs
    h = dz = None
    if need_x or need_down or need_down_bias:
        h, dz = _hidden(x, down_weight, down_bias, dy, up_weight, activation, scaling, need_up)
    elif need_up:
        h, _ = _hidden(x, down_weight, down_bias, None, up_weight, activation, scaling, True)
    dx, d_down, d_up = (
        x.new_empty(0) for _ in range(3)
    )  # a tensor each: an op's results share no memory
    sums = {"dtype": torch.float32}
    if need_x:
        dx = _product(
            dz, down_weight, torch.empty_like(x), x.dtype, 1.0, None, dy if residual_is_x else None
        )
    if need_down:
        d_down = _product(dz.t(), x, torch.empty_like(down_weight), x.dtype, 1.0)
    if need_up:
        d_up = _product(dy.t(), h, torch.empty_like(up_weight), x.dtype, scaling)
    d_down_bias = dz.sum(0, **sums) if need_down_bias else x.new_empty(0, **sums)
    d_up_bias = dy.sum(0, **sums) * scaling if need_up_bias else x.new_empty(0, **sums)
    return dx, d_down.to(down_weight.dtype), d_down_bias, d_up.to(up_weight.dtype), d_up_bias


def _hidden(x, down_weight, down_bias, dy, up_weight, activation, scaling, write_h):
    """h and, given dy, dz, in x's dtype; h None unless written."""
    m, bottleneck = len(x), up_weight.shape[1]
    h = x.new_empty(m, bottleneck) if write_h else None
    dz = None if dy is None else x.new_empty(m, bottleneck)
    if numel := m * bottleneck:
        z, dh = (
            _parts(x, down_weight.t(), x.dtype),
            None if dy is None else _parts(dy, up_weight, x.dtype),
        )
        sizes = (numel, bottleneck, len(z), 0 if dh is None else len(dh), scaling)
        constants = dict(ACTIVATION=activation, BLOCK=HIDDEN_BLOCK, num_warps=4, **OPTIONS)
        _hidden_kernel[(cdiv(numel, HIDDEN_BLOCK),)](z, dh, down_bias, h, dz, *sizes, **constants)
    return h, dz


def _product(a, b, c, dtype, scaling, bias=None, residual=None) -> torch.Tensor:
    """C = residual + scaling * (a b + bias). A sum over many steps is split among programs, where nothing is added."""
    if c.numel() == 0:
        return c
    if bias is None and residual is None:
        parts = _parts(a, b, dtype, scaling, c)
        return c if parts is c else sum_parts(parts, None, c)
    steps = cdiv(a.shape[1], product_config(*a.shape, dtype)["BK"])
    return _launch_product(a, b, bias, residual, c, scaling, 1, steps, dtype)


def _parts(a, b, dtype, scaling=1.0, whole=None) -> torch.Tensor:
    """Scaling * a b in fp32 parts [splits, m, n]; if one is all, it is `whole`, where that is
    given.

    Two programs for each of an H100's 132 SMs, at least four steps each. No number of SMs is looked
    up, so that the bits of a result don't depend on it.
    """
    (m, k), n = a.shape, b.shape[1]
    config = product_config(m, k, dtype)
    steps = cdiv(k, config["BK"])
    each = max(
        1,
        cdiv(
            steps,
            max(1, min(264 // (cdiv(m, config["BM"]) * cdiv(n, config["BN"])), steps // 4, 32)),
        ),
    )
    splits = max(1, cdiv(steps, each))
    if splits == 1 and whole is not None:
        return _launch_product(a, b, None, None, whole, scaling, 1, each, dtype)
    parts = torch.empty(splits, m, n, dtype=torch.float32, device=a.device)
    return _launch_product(a, b, None, None, parts, scaling, splits, each, dtype)


def _launch_product(a, b, bias, residual, c, scaling, splits, each, dtype) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    config = product_config(m, k, dtype)
    grid = cdiv(m, config["BM"]), cdiv(n, config["BN"]), splits
    sizes = (m, n, k, *a.stride(), *b.stride(), scaling, each)
    T = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    _product_kernel[grid](a, b, bias, residual, c, *sizes, T=T, **config, **OPTIONS)
    return c
