"""LoRA's registered ops: checks, fakes, launches.

CPU kernels are in csrc/cpu/linear, GPU kernels in kernels/lora.py and kernels/lora_backward.py.

`base` is a dense weight, [W] with blocksize 0, or the state of an NF4Weight. `lora_a` is
[n, r, in] and `lora_b` [n, out, r] for n adapters. `route` sorts rows by adapter: [] when n = 1,
or [order, starts, scales].
"""

import math

import torch
from torch import Tensor

from pyfast import reference
from pyfast._support import checks, registry
from pyfast._support.dtypes import sum_dtype
from pyfast.ops.registered.nf4 import check_state, forced_path

# --- checks: sizes, devices, and the dtypes that kernels take for granted ---


def _check_shrink(x, lora_a, scaling, dropout_p, seeds, route):
    n, _, in_features = lora_a[0].shape
    checks.rows(x, in_features)
    for a in lora_a:
        _check_sizes("lora_a", a, (n, a.shape[1], in_features), x)
    if len(scaling) != len(lora_a):
        raise ValueError(
            f"scaling has {len(scaling)} elements; "
            f"it must have one for each of {len(lora_a)} lora_a"
        )
    _check_seeds(x, dropout_p, seeds, len(lora_a))
    _check_route(x, route, n)


def _check_linear(x, s, base, lora_b, bias, gain, shape, blocksize, route):
    (out, in_features), (n, _, rank) = shape, lora_b.shape
    checks.rows(x, in_features)
    _check_base(x, base, shape, blocksize)
    _check_sizes("s", s, (*x.shape[:-1], rank), x)
    _check_sizes("lora_b", lora_b, (n, out, rank), x)
    _check_sizes("bias", bias, (out,), x)
    _check_sizes("gain", gain, (out,), x)
    _check_route(x, route, n)


def _check_expand_backward(dy, s, lora_b, gain, z, scaling, route, needs):
    n, out, rank = lora_b.shape
    checks.rows(dy, out)
    _check_sizes("s", s, (*dy.shape[:-1], rank), dy)
    _check_sizes("lora_b", lora_b, (n, out, rank), dy)
    _check_sizes("gain", gain, (out,), dy)
    _check_sizes("z", z, tuple(dy.shape), dy)
    if len(needs) != 4 or (needs[3] and z is None):
        raise ValueError(
            f"needs is {needs}; it must have 4 elements, and z must be there for the last"
        )
    _check_route(dy, route, n)


def _check_linear_backward(
    dy, u, base, lora_a, gain, add, shape, blocksize, dropout_p, seed, route
):
    (out, in_features), (n, rank, _) = shape, lora_a.shape
    checks.rows(dy, out)
    _check_base(dy, base, shape, blocksize)
    _check_sizes("u", u, (*dy.shape[:-1], rank), dy)
    _check_sizes("lora_a", lora_a, (n, rank, in_features), dy)
    _check_sizes("gain", gain, (out,), dy)
    _check_sizes("add", add, (*dy.shape[:-1], in_features), dy)
    _check_seeds(dy, dropout_p, seed, 1)
    _check_route(dy, route, n)


def _check_shrink_backward(u, x, ranks, n, dropout_p, seeds, route, dtype):
    checks.rows(x, x.shape[-1] if x.dim() else 0)
    if n < 0 or any(rank < 0 for rank in ranks):
        raise ValueError(f"n is {n} and ranks are {ranks}; they must be 0 or more")
    _check_sizes("u", u, (*x.shape[:-1], sum(ranks)), x)
    _check_seeds(x, dropout_p, seeds, len(ranks))
    _check_route(x, route, n)


def _check_row_squares(base, shape, blocksize):
    _check_base(base[0], base, shape, blocksize)


def _check_sizes(name: str, tensor: Tensor | None, sizes: tuple[int, ...], x: Tensor) -> None:
    if tensor is not None:
        checks.shape(name, tensor, sizes)
        checks.same_device(name, tensor, "x", x.device)


def _check_base(x: Tensor, base: list[Tensor], shape, blocksize: int) -> None:
    if blocksize:
        check_state(base, math.prod(shape), blocksize, x)
    elif len(base) != 1:
        raise ValueError(f"base has {len(base)} tensors; it must be one, a dense weight")
    else:
        _check_sizes("base", base[0], tuple(shape), x)


def _check_seeds(x: Tensor, dropout_p: float, seeds: Tensor | None, count: int) -> None:
    if reference.dropout_threshold(dropout_p) == 0:
        return
    if seeds is None or seeds.dtype != torch.int64 or seeds.numel() != count:
        actual = None if seeds is None else f"{seeds.dtype} {list(seeds.shape)}"
        raise ValueError(
            f"seeds is {actual}; it must be int64, one for each of {count} projections"
        )
    checks.same_device("seeds", seeds, "x", x.device)


def _check_route(x: Tensor, route: list[Tensor], n: int) -> None:
    if not route:
        if n != 1:
            raise ValueError(f"route is empty; it must not be with {n} adapters")
        return
    sizes, dtypes = [x.shape[:-1].numel(), n + 1, n], [torch.int32, torch.int32, torch.float32]
    if [t.numel() for t in route] != sizes or [t.dtype for t in route] != dtypes:
        actual = [(t.dtype, t.numel()) for t in route]
        raise ValueError(
            f"route is {actual}; it must be order, starts and scales: {list(zip(dtypes, sizes))}"
        )
    for tensor in route:
        checks.same_device("route", tensor, "x", x.device)


# --- fakes ---


def _shrink_fake(x, lora_a, scaling, dropout_p, seeds, route):
    return x.new_empty(*x.shape[:-1], sum(a.shape[1] for a in lora_a), dtype=sum_dtype(x))


def _linear_fake(x, s, base, lora_b, bias, gain, shape, blocksize, route):
    return x.new_empty(*x.shape[:-1], shape[0])


def _expand_backward_fake(dy, s, lora_b, gain, z, scaling, route, needs):
    sizes = [(*s.shape,), (*lora_b.shape,), (dy.shape[-1],), (dy.shape[-1],)]
    dtypes = [sum_dtype(dy), lora_b.dtype, sum_dtype(dy), sum_dtype(dy)]
    return tuple(
        dy.new_empty(z if need else (0,), dtype=t) for z, t, need in zip(sizes, dtypes, needs)
    )


def _linear_backward_fake(dy, u, base, lora_a, gain, add, shape, blocksize, dropout_p, seed, route):
    return dy.new_empty(*dy.shape[:-1], shape[1])


def _shrink_backward_fake(u, x, ranks, n, dropout_p, seeds, route, dtype):
    return [x.new_empty(n, r, x.shape[-1], dtype=dtype) for r in ranks]


def _row_squares_fake(base, shape, blocksize):
    return base[0].new_empty(shape[0], dtype=torch.float32)


# --- launches ---


def _launch_with_forced_path(launcher, *args):
    return launcher(*args, path=forced_path())


# --- registration ---

shrink = registry.register(
    "lora_shrink",
    check=_check_shrink,
    fake=_shrink_fake,
    kernel="lora:shrink",
    reference=reference.lora_shrink_op,
)

linear = registry.register(
    "lora_linear",
    check=_check_linear,
    fake=_linear_fake,
    kernel="lora:linear",
    launch=_launch_with_forced_path,
    reference=reference.lora_linear_op,
)

expand_backward = registry.register(
    "lora_expand_backward",
    check=_check_expand_backward,
    fake=_expand_backward_fake,
    kernel="lora_backward:expand_backward",
    reference=reference.lora_expand_backward_op,
)

linear_backward = registry.register(
    "lora_linear_backward",
    check=_check_linear_backward,
    fake=_linear_backward_fake,
    kernel="lora_backward:linear_backward",
    launch=_launch_with_forced_path,
    reference=reference.lora_linear_backward_op,
)

shrink_backward = registry.register(
    "lora_shrink_backward",
    check=_check_shrink_backward,
    fake=_shrink_backward_fake,
    kernel="lora_backward:shrink_backward",
    reference=reference.lora_shrink_backward_op,
)

row_squares = registry.register(
    "lora_row_squares",
    check=_check_row_squares,
    fake=_row_squares_fake,
    kernel="lora:row_squares",
    reference=reference.lora_row_squares_op,
)
