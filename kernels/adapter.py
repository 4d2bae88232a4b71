"""Bottleneck adapters on a GPU: y = residual + scaling * (act(x Wd^T + bd) Wu^T + bu)

The forward takes three launches: z = x Wd^T, in parts of `in` so that few rows keep all of a GPU
busy; h = act of the parts' sum, which is small; and the product with Wu. One kernel does all
products. `reference.adapter_op` and `reference.adapter_backward_op` are the definitions.

Sums are in fp32. Products of 16 bits round hidden values, gradients and fp32 parameters to x's type
on their way to the tensor cores. Splits are added up in a fixed order: same inputs, same bits.
"""

import torch
import triton
import triton.language as tl

from ._launch import FUSED, cdiv
from ._split_sums import sum_parts

# Elements that a program of adapter_hidden_kernel owns.
HIDDEN_TILE = 512


# ---------------------------------------------------------------- kernels


@triton.jit
def _tanh(z):
    """Return tanh(z): its Taylor series where |z| < 0.3, else (1 - e^-2|z|) / (1 + e^-2|z|)."""
    size = tl.abs(z)
    e = tl.exp(-2 * size)
    square = z * z
    series = -0.05396825397 + square * 0.02186948854
    series = 1 + square * (-0.33333333333 + square * (0.13333333333 + square * series))
    quotient = (1 - e) / (1 + e)
    return tl.where(size < 0.3, z * series, tl.where(z < 0, -quotient, quotient))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """Return act(z) and its derivative act'(z)."""
    if ACTIVATION == "relu":
        # The comparison is false for NaN, so that NaN stays NaN.
        value = tl.where(z <= 0, 0.0, z)
        derivative = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(z * 0.70710678119))
        value = z * below
        derivative = below + z * 0.39894228040 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        t = _tanh(0.79788456080 * (z + 0.044715 * z * z * z))
        value = 0.5 * z * (1 + t)
        derivative = 0.5 * (1 + t) + 0.39894228040 * z * (1 - t * t) * (1 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-z))
        value = z * s
        derivative = s * (1 + z * (1 - s))
    else:
        value = _tanh(z)
        derivative = 1 - value * value
    return value, derivative


@triton.jit
def _load_tile(ptr, row, col, row_stride, col_stride, rows, cols, T: tl.constexpr):
    """Return a tile of a [rows, cols] matrix in type T, 0 outside the matrix."""
    offset = row.to(tl.int64)[:, None] * row_stride + col.to(tl.int64)[None, :] * col_stride
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(ptr + offset, mask=mask, other=0.0).to(T)


@triton.jit
def _load_sum(parts_ptr, i, inside, splits, numel):
    """Return the sum over s of parts[s, i], in the order of s."""
    acc = tl.zeros([i.shape[0]], tl.float32)
    for _ in range(splits):
        acc += tl.load(parts_ptr + i, mask=inside, other=0.0)
        parts_ptr += numel
    return acc


@triton.jit
def adapter_hidden_kernel(
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
    """Compute h = act(z) and dz = scaling * dh act'(z); each is written if it has a pointer.

    z is bias + the sum of its parts, and dh is the sum of its parts. Grid: tiles of BLOCK of the
    M x bottleneck elements; a program owns one.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    z = _load_sum(z_ptr, i, inside, z_splits, numel)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + i % bottleneck, mask=inside, other=0.0).to(tl.float32)
    h, derivative = _activate(z, ACTIVATION)
    if h_ptr is not None:
        tl.store(h_ptr + i, h.to(h_ptr.dtype.element_ty), mask=inside)
    if dz_ptr is not None:
        dh = scaling * _load_sum(dh_ptr, i, inside, dh_splits, numel)
        dz = tl.where(z <= 0, 0.0, dh) if ACTIVATION == "relu" else dh * derivative
        tl.store(dz_ptr + i, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def adapter_product_kernel(
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
    """Compute c = residual + scaling * (a[m, k] b[k, n] + bias).

    T is the type of the product's operands. Grid: (tiles of M, tiles of N, splits of K of `steps`
    tiles each). With more than one split c is fp32 [splits, m, n], to be added up.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(k, BK))):
        inner = step * BK + tl.arange(0, BK)
        a = _load_tile(a_ptr, row, inner, a_row, a_col, m, k, T)
        b = _load_tile(b_ptr, inner, col, b_row, b_col, k, n, T)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
    acc *= scaling
    if residual_ptr is not None:
        acc += _load_tile(residual_ptr, row, col, n, 1, m, n, tl.float32)
    offset = split.to(tl.int64) * m * n + row.to(tl.int64)[:, None] * n + col[None, :]
    mask = (row < m)[:, None] & (col < n)[None, :]
    tl.store(c_ptr + offset, acc.to(c_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


def product_config(m: int, k: int, dtype: torch.dtype) -> dict[str, int]:
    """Return BM, BN, BK, num_warps and num_stages of a product with m rows and a sum over k."""
    # fp32 has no tensor cores, so its tiles are small and stay in registers.
    if dtype == torch.float32:
        return dict(BM=16 if m <= 16 else 32, BN=32, BK=32, num_warps=4, num_stages=2)
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    # A few steps leave nothing to pipeline.
    return dict(BM=rows, BN=64, BK=64, num_warps=4, num_stages=3 if k > 256 else 1)


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
    """Return y[M, out] in residual's dtype; all tensors are contiguous."""
    y = torch.empty_like(residual)
    if y.numel() == 0:
        return y
    h, _ = _launch_hidden(x, down_weight, down_bias, None, up_weight, activation, scaling, True)
    return _multiply(h, up_weight.t(), y, x.dtype, scaling, up_bias, residual)


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
    """Return the gradients of x, down_weight, down_bias, up_weight and up_bias.

    Those that `needs`, five booleans, does not ask for are empty. All tensors are contiguous.
    """
    need_x, need_down, need_down_bias, need_up, need_up_bias = needs
    h = dz = None
    if need_x or need_down or need_down_bias:
        h, dz = _launch_hidden(
            x, down_weight, down_bias, dy, up_weight, activation, scaling, need_up
        )
    elif need_up:
        h, _ = _launch_hidden(x, down_weight, down_bias, None, up_weight, activation, scaling, True)
    # Each is a tensor of its own, since the results of an op share no memory.
    dx, d_down, d_up = (x.new_empty(0) for _ in range(3))
    sums = {"dtype": torch.float32}
    if need_x:
        residual = dy if residual_is_x else None
        dx = _multiply(dz, down_weight, torch.empty_like(x), x.dtype, 1.0, None, residual)
    if need_down:
        d_down = _multiply(dz.t(), x, torch.empty_like(down_weight), x.dtype, 1.0)
    if need_up:
        d_up = _multiply(dy.t(), h, torch.empty_like(up_weight), x.dtype, scaling)
    d_down_bias = dz.sum(0, **sums) if need_down_bias else x.new_empty(0, **sums)
    d_up_bias = dy.sum(0, **sums) * scaling if need_up_bias else x.new_empty(0, **sums)
    return dx, d_down.to(down_weight.dtype), d_down_bias, d_up.to(up_weight.dtype), d_up_bias


def _launch_hidden(x, down_weight, down_bias, dy, up_weight, activation, scaling, write_h):
    """Return h and dz in x's dtype; h is None unless `write_h`, dz is None without dy."""
    m, bottleneck = len(x), up_weight.shape[1]
    h = x.new_empty(m, bottleneck) if write_h else None
    dz = None if dy is None else x.new_empty(m, bottleneck)
    if numel := m * bottleneck:
        z = _multiply_in_parts(x, down_weight.t(), x.dtype)
        dh = None if dy is None else _multiply_in_parts(dy, up_weight, x.dtype)
        sizes = (numel, bottleneck, len(z), 0 if dh is None else len(dh), scaling)
        constants = dict(ACTIVATION=activation, BLOCK=HIDDEN_TILE, num_warps=4, **FUSED)
        adapter_hidden_kernel[(cdiv(numel, HIDDEN_TILE),)](
            z, dh, down_bias, h, dz, *sizes, **constants
        )
    return h, dz


def _multiply(a, b, c, dtype, scaling, bias=None, residual=None) -> torch.Tensor:
    """Write residual + scaling * (a b + bias) to c and return it.

    A sum over many steps is split among programs where neither bias nor residual is added.
    """
    if c.numel() == 0:
        return c
    if bias is None and residual is None:
        parts = _multiply_in_parts(a, b, dtype, scaling, c)
        return c if parts is c else sum_parts(parts, None, c)
    steps = cdiv(a.shape[1], product_config(*a.shape, dtype)["BK"])
    return _launch_product(a, b, bias, residual, c, scaling, 1, steps, dtype)


def _multiply_in_parts(a, b, dtype, scaling=1.0, target=None) -> torch.Tensor:
    """Return scaling * a b in fp32 parts [splits, m, n].

    A single part is written to `target` instead, if there is one, and `target` is returned. There
    are two programs for each of an H100's 132 SMs, of at least four steps each, and at most 32
    parts. No number of SMs is looked up, so that the bits of a result do not depend on it.
    """
    (m, k), n = a.shape, b.shape[1]
    config = product_config(m, k, dtype)
    steps = cdiv(k, config["BK"])
    tiles = cdiv(m, config["BM"]) * cdiv(n, config["BN"])
    max_splits = max(1, min(264 // tiles, steps // 4, 32))
    split_steps = max(1, cdiv(steps, max_splits))
    splits = max(1, cdiv(steps, split_steps))
    if splits == 1 and target is not None:
        return _launch_product(a, b, None, None, target, scaling, 1, split_steps, dtype)
    parts = torch.empty(splits, m, n, dtype=torch.float32, device=a.device)
    return _launch_product(a, b, None, None, parts, scaling, splits, split_steps, dtype)


def _launch_product(a, b, bias, residual, c, scaling, splits, steps, dtype) -> torch.Tensor:
    """Launch adapter_product_kernel in `splits` of `steps` tiles of K each, and return c."""
    (m, k), n = a.shape, b.shape[1]
    config = product_config(m, k, dtype)
    grid = cdiv(m, config["BM"]), cdiv(n, config["BN"]), splits
    sizes = (m, n, k, *a.stride(), *b.stride(), scaling, steps)
    T = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    adapter_product_kernel[grid](a, b, bias, residual, c, *sizes, T=T, **config, **FUSED)
    return c
