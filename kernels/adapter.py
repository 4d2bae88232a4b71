"""Bottleneck adapters on a GPU: y = residual + scaling * (act(x Wd^T + bd) Wu^T + bu), and the gradients.

A bottleneck of at most FUSED columns is one kernel: a program owns rows of x and keeps their hidden values. A wider one
takes two, with the hidden values in memory between them, as does the backward, whose weight gradients need them.
Sums are in fp32; 16-bit products round hidden values, slopes and fp32 parameters to x's type on their way to the tensor
cores. Splits are added up in a fixed order: same inputs, same bits.
"""

import torch
import triton
import triton.language as tl

FUSED = 128
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
    return tl.load(ptr + offset, mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0).to(T)


@triton.jit
def _rows_times(x_ptr, row, m, k, w_ptr, col, n, k_stride, n_stride, acc, BK: tl.constexpr, T: tl.constexpr):
    """acc[BM, BN] + x[row, :] w[:, col]; x is [m, k], w [k, n] with these strides."""
    for k0 in range(0, k, BK):
        step = k0 + tl.arange(0, BK)
        a = _tile(x_ptr, row, step, k, 1, m, k, T)
        b = _tile(w_ptr, step, col, k_stride, n_stride, k, n, T)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _adapter_kernel(
    x_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    residual_ptr,
    y_ptr,
    m,
    into,
    bottleneck,
    out,
    scaling,
    ACTIVATION: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid: tiles of M. A program owns y[BM, :]; BH >= bottleneck."""
    T: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    hidden = tl.arange(0, BH)
    z = tl.zeros([BM, BH], tl.float32)
    z = _rows_times(x_ptr, row, m, into, down_ptr, hidden, bottleneck, 1, into, z, BK, T)
    if HAS_DOWN_BIAS:
        z += tl.load(down_bias_ptr + hidden, mask=hidden < bottleneck, other=0.0).to(tl.float32)[None, :]
    h, _ = _activate(z, ACTIVATION)
    h = tl.where((hidden < bottleneck)[None, :], h, 0.0).to(T)  # outside: 0 even where x is not finite
    for n0 in range(0, out, BN):
        col = n0 + tl.arange(0, BN)
        up = _tile(up_ptr, hidden, col, 1, bottleneck, bottleneck, out, T)
        acc = tl.dot(h, up, input_precision="ieee")
        if HAS_UP_BIAS:
            acc += tl.load(up_bias_ptr + col, mask=col < out, other=0.0).to(tl.float32)[None, :]
        acc = _tile(residual_ptr, row, col, out, 1, m, out, tl.float32) + scaling * acc
        offset = row.to(tl.int64)[:, None] * out + col[None, :]
        inside = (row < m)[:, None] & (col < out)[None, :]
        tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_kernel(
    x_ptr,
    down_ptr,
    down_bias_ptr,
    dy_ptr,
    up_ptr,
    h_ptr,
    dz_ptr,
    m,
    into,
    bottleneck,
    out,
    scaling,
    ACTIVATION: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    WRITE_H: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
):
    """h = act(z) and dz = scaling * (dy Wu) act'(z), [M, bottleneck]. Grid: (tiles of M, tiles of the bottleneck)."""
    T: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    hidden = tl.program_id(1) * BH + tl.arange(0, BH)
    z = tl.zeros([BM, BH], tl.float32)
    z = _rows_times(x_ptr, row, m, into, down_ptr, hidden, bottleneck, 1, into, z, BK, T)
    if HAS_DOWN_BIAS:
        z += tl.load(down_bias_ptr + hidden, mask=hidden < bottleneck, other=0.0).to(tl.float32)[None, :]
    offset = row.to(tl.int64)[:, None] * bottleneck + hidden[None, :]
    inside = (row < m)[:, None] & (hidden < bottleneck)[None, :]
    if WRITE_DZ:  # before the activation, whose values would wait in registers
        dh = tl.zeros([BM, BH], tl.float32)
        dh = _rows_times(dy_ptr, row, m, out, up_ptr, hidden, bottleneck, bottleneck, 1, dh, BK, T)
    h, slope = _activate(z, ACTIVATION)
    if WRITE_H:
        tl.store(h_ptr + offset, h.to(T), mask=inside)
    if WRITE_DZ:
        dz = tl.where(z <= 0, 0.0, scaling * dh) if ACTIVATION == "relu" else scaling * dh * slope
        tl.store(dz_ptr + offset, dz.to(T), mask=inside)


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
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    T: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """c = residual + scaling * (a[m, k] b[k, n] + bias). Grid: (tiles of M, of N, splits of K, `steps` tiles each).

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
    if HAS_BIAS:
        acc += tl.load(bias_ptr + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
    acc *= scaling
    if HAS_RESIDUAL:
        acc += _tile(residual_ptr, row, col, n, 1, m, n, tl.float32)
    offset = split.to(tl.int64) * m * n + row.to(tl.int64)[:, None] * n + col[None, :]
    tl.store(c_ptr + offset, acc.to(c_ptr.dtype.element_ty), mask=(row < m)[:, None] & (col < n)[None, :])


# ---------------------------------------------------------------- launchers


def tile_config(kernel: str, m: int, bottleneck: int, dtype: torch.dtype) -> dict[str, int]:
    """The tiles of a kernel, "adapter", "hidden" or "product", num_warps and num_stages. Derived, not measured."""
    exact = dtype == torch.float32  # no tensor cores: small tiles, all in registers
    width = max(16, triton.next_power_of_2(bottleneck))
    if kernel == "product":
        if exact:
            return dict(BM=32, BN=32, BK=32, num_warps=4, num_stages=2)
        return dict(BM=64, BN=64, BK=64, num_warps=4, num_stages=3)
    rows = 16 if exact or m <= 2048 else 64  # few rows: more programs
    config = dict(BM=rows, BH=min(width, 64 if exact and kernel == "hidden" else FUSED), BK=16 if exact else 64)
    if kernel == "adapter":
        config |= dict(BN=32 if exact else 64)
    # The backward's hidden kernel holds two of these sums.
    return config | dict(num_warps=8 if kernel == "hidden" and rows * config["BH"] >= 8192 else 4, num_stages=2)


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
    (m, into), (out, bottleneck) = x.shape, up_weight.shape
    y = torch.empty_like(residual)
    if y.numel() == 0:
        return y
    if bottleneck > FUSED:
        h, _ = _hidden(x, down_weight, down_bias, None, up_weight, activation, scaling, True)
        return _product(h, up_weight.t(), y, x.dtype, scaling, up_bias, residual)
    config = tile_config("adapter", m, bottleneck, x.dtype)
    _adapter_kernel[(triton.cdiv(m, config["BM"]),)](
        x,
        down_weight,
        _or(down_bias, x),
        up_weight,
        _or(up_bias, x),
        residual,
        y,
        m,
        into,
        bottleneck,
        out,
        scaling,
        ACTIVATION=activation,
        HAS_DOWN_BIAS=down_bias is not None,
        HAS_UP_BIAS=up_bias is not None,
        **config,
        **OPTIONS,
    )
    return y


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
    nothing, h, dz = x.new_empty(0), None, None
    if need_x or need_down or need_down_bias:
        h, dz = _hidden(x, down_weight, down_bias, dy, up_weight, activation, scaling, need_up)
    elif need_up:
        h, _ = _hidden(x, down_weight, down_bias, None, up_weight, activation, scaling, True)
    dx = d_down = d_up = nothing
    sums = {"dtype": torch.float32}
    if need_x:
        dx = _product(dz, down_weight, torch.empty_like(x), x.dtype, 1.0, None, dy if residual_is_x else None)
    if need_down:
        d_down = _product(dz.t(), x, torch.empty_like(down_weight), x.dtype, 1.0)
    if need_up:
        d_up = _product(dy.t(), h, torch.empty_like(up_weight), x.dtype, scaling)
    d_down_bias = dz.sum(0, **sums) if need_down_bias else nothing.float()
    d_up_bias = dy.sum(0, **sums) * scaling if need_up_bias else nothing.float()
    return dx, d_down.to(down_weight.dtype), d_down_bias, d_up.to(up_weight.dtype), d_up_bias


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel's pointer that may go unused."""
    return other if tensor is None else tensor


def _hidden(x, down_weight, down_bias, dy, up_weight, activation, scaling, write_h):
    """h and, given dy, dz, in x's dtype; h None unless written."""
    (m, into), (out, bottleneck) = x.shape, up_weight.shape
    h = x.new_empty(m, bottleneck) if write_h else None
    dz = None if dy is None else x.new_empty(m, bottleneck)
    if m:
        config = tile_config("hidden", m, bottleneck, x.dtype)
        grid = (triton.cdiv(m, config["BM"]), triton.cdiv(bottleneck, config["BH"]))
        _hidden_kernel[grid](
            x,
            down_weight,
            _or(down_bias, x),
            _or(dy, x),
            up_weight,
            _or(h, x),
            _or(dz, x),
            m,
            into,
            bottleneck,
            out,
            scaling,
            ACTIVATION=activation,
            HAS_DOWN_BIAS=down_bias is not None,
            WRITE_H=write_h,
            WRITE_DZ=dz is not None,
            **config,
            **OPTIONS,
        )
    return h, dz


def _product(a, b, c, dtype, scaling, bias=None, residual=None) -> torch.Tensor:
    """C = residual + scaling * (a b + bias). A sum over many steps is split among programs, where nothing is added."""
    (m, k), n = a.shape, b.shape[1]
    if c.numel() == 0:
        return c
    config = tile_config("product", m, n, dtype)
    grid = triton.cdiv(m, config["BM"]), triton.cdiv(n, config["BN"])
    steps = triton.cdiv(k, config["BK"])
    plain = bias is None and residual is None
    # Two programs for each of an H100's 132 SMs, at least four steps each. No number of SMs is looked up, so that the
    # bits of a result don't depend on it.
    splits = max(1, min(264 // (grid[0] * grid[1]), steps // 4, 32)) if plain else 1
    each = triton.cdiv(steps, splits)
    splits = max(1, triton.cdiv(steps, max(1, each)))
    target = c if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=c.device)
    _product_kernel[(*grid, splits)](
        a,
        b,
        _or(bias, a),
        _or(residual, a),
        target,
        m,
        n,
        k,
        *a.stride(),
        *b.stride(),
        scaling,
        each,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        T={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype],
        **config,
        **OPTIONS,
    )
    return c if splits == 1 else c.copy_(target.sum(0))
