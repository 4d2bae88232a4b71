"""LoRA's kernels, as their launchers configure them, compiled for three GPUs without a GPU.

The launchers run on tensors without memory, and the kernels that they would launch are compiled for
sm_80, sm_90 and sm_100. A kernel must not spill, its shared memory must fit, it must use tensor
cores for 16 bits and none for fp32, and it must use no atomics.
"""

import contextlib
from unittest import mock

import pytest
import torch
from helpers import triton_build
from helpers.triton_build import NAMES, every_capability, has_atomics, has_tensor_cores

from pyfast.kernels import lora, lora_backward, lora_base

pytestmark = pytest.mark.needs("compiler")
# pytest finds fixtures in the module of a test.
checked = triton_build.checked
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape, dtype=FP32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def state(n, k, nested=True):
    blocks = n * k // 64
    packed, code = empty(n * k // 2, dtype=torch.uint8), empty(16)
    if not nested:
        return [packed, empty(blocks), code]
    return [
        packed,
        empty(blocks, dtype=torch.uint8),
        code,
        empty(blocks // 256),
        empty(256),
        empty(1),
    ]


def route(adapters, m):
    return [empty(m, dtype=torch.int32), empty(adapters + 1, dtype=torch.int32), empty(adapters)]


def launches(run, capability):
    """Return the Builds of all kernels that run() launches."""
    with contextlib.ExitStack() as patches:
        for module in (lora, lora_backward, lora_base):
            patch = mock.patch.object(module, "capability", lambda x: divmod(capability, 10))
            patches.enter_context(patch)
        return triton_build.launches(run, capability)


def case(name, run):
    """Return (id, capability -> the first kernel that run() launches)."""
    return name, lambda capability: launches(run, capability)[0]


def last_case(name, run):
    """Return (id, capability -> the last kernel that run() launches)."""
    return name, lambda capability: launches(run, capability)[-1]


# ---------------------------------------------------------------- S


def shrink(dtype, m, r, *, count=1, p=0.0, adapters=0, a_dtype=None):
    seeds = empty(count, dtype=torch.int64) if p else None
    a = [empty(max(1, adapters), r, 4096, dtype=a_dtype or dtype)] * count
    routed = route(adapters, m) if adapters else []
    name = f"{NAMES[dtype]}-M{m}-r{r}-x{count}" + "-dropout" * bool(p) + "-routed" * bool(adapters)
    return case(
        name, lambda: lora.shrink(empty(m, 4096, dtype=dtype), a, [1.0] * count, p, seeds, routed)
    )


@every_capability(
    [
        shrink(BF16, 1, 16),
        shrink(BF16, 8192, 16, p=0.1, count=3, a_dtype=FP32),
        shrink(BF16, 8192, 64, p=0.1),
        shrink(FP16, 8192, 64, a_dtype=FP32),
        shrink(BF16, 512, 64, adapters=20),
        shrink(FP32, 512, 64, p=0.1),
    ]
)
def test_shrink_compiles_well(build, checked):
    assert_tensor_cores_and_no_atomics(build, checked)


def assert_tensor_cores_and_no_atomics(build, checked):
    """Assert that a kernel of 16 bits uses tensor cores, one of fp32 none, and neither atomics."""
    tensor_cores = has_tensor_cores(checked)
    pointers = dict(build.pointers)
    assert tensor_cores == (pointers.get("x_ptr", pointers.get("dy_ptr")) != "fp32")
    assert not has_atomics(checked)


# ---------------------------------------------------------------- y


def linear(
    dtype,
    m,
    r,
    *,
    nf4=True,
    nested=True,
    path=None,
    gain=True,
    adapters=0,
    n=4096,
    k=4096,
    bdt=FP32,
):
    base = state(n, k, nested) if nf4 else [empty(n, k, dtype=dtype)]
    routed = route(adapters, m) if adapters else []
    vectors = [empty(n)] * 2 if gain else [None] * 2
    args = (
        empty(m, r),
        base,
        empty(max(1, adapters), n, r, dtype=bdt),
        *vectors,
        (n, k),
        64 * nf4,
        routed,
        path,
    )
    base_name = "panel" if path == "panel" else "nf4" if nf4 else "dense"
    name = (
        f"{NAMES[dtype]}-M{m}-r{r}-{base_name}-K{k}" + "-gain" * gain + "-routed" * bool(adapters)
    )
    return case(name, lambda: lora.linear(empty(m, k, dtype=dtype), *args))


LINEAR = [
    linear(BF16, 1, 16),
    linear(BF16, 16, 64, adapters=20),
    linear(BF16, 64, 16),
    linear(BF16, 64, 64, adapters=20),
    linear(BF16, 256, 64, path="fused"),
    linear(FP16, 256, 16, nested=False, gain=False, bdt=FP16, path="fused"),
    linear(BF16, 64, 64, k=4095),
    linear(FP32, 16, 16),
    linear(BF16, 1, 16, nf4=False),
    linear(BF16, 256, 64, nf4=False, path="fused"),
    linear(BF16, 256, 64, nf4=False, adapters=20, path="fused"),
    linear(FP32, 16, 16, nf4=False),
    linear(BF16, 4096, 64, nf4=False, path="panel", adapters=20),
    linear(FP32, 4096, 16, nf4=False, path="panel"),
]


@every_capability(LINEAR)
def test_linear_compiles_well(build, checked):
    assert_tensor_cores_and_no_atomics(build, checked)


# ---------------------------------------------------------------- dx


def linear_backward(
    dtype, m, r, *, nf4=True, path=None, gain=True, adapters=0, p=0.0, n=4096, k=4096
):
    base = state(n, k) if nf4 else [empty(n, k, dtype=dtype)]
    routed = route(adapters, m) if adapters else []
    add = empty(m, k, dtype=dtype) if gain else None
    seed = empty((), dtype=torch.int64) if p else None
    a = empty(max(1, adapters), r, k)
    args = (
        empty(m, r),
        base,
        a,
        empty(n) if gain else None,
        add,
        (n, k),
        64 * nf4,
        p,
        seed,
        routed,
        path,
    )
    base_name = "panel" if path == "panel" else "nf4" if nf4 else "dense"
    flags = "-gain" * gain + "-dropout" * bool(p) + "-routed" * bool(adapters)
    run = lambda: lora_backward.linear_backward(empty(m, n, dtype=dtype), *args)  # noqa: E731
    return case(f"{NAMES[dtype]}-M{m}-r{r}-{base_name}-K{k}{flags}", run)


@every_capability(
    [
        linear_backward(BF16, 1, 16),
        linear_backward(BF16, 128, 64, p=0.1, path="fused"),
        linear_backward(BF16, 128, 64, adapters=20, path="fused"),
        linear_backward(BF16, 128, 64, k=4095, p=0.1, path="fused"),
        linear_backward(FP32, 16, 16, p=0.1),
        linear_backward(BF16, 16, 16, nf4=False, p=0.1),
        linear_backward(BF16, 256, 64, nf4=False, p=0.1, path="fused"),
        linear_backward(FP16, 256, 64, nf4=False, adapters=20, gain=False, path="fused"),
        linear_backward(FP16, 256, 64, nf4=False, adapters=20, gain=False, path="panel"),
        linear_backward(FP32, 16, 16, nf4=False, p=0.1),
        linear_backward(BF16, 4096, 64, nf4=False, path="panel", p=0.1),
        linear_backward(FP32, 4096, 16, nf4=False, path="panel", p=0.1),
    ]
)
def test_linear_backward_compiles_well(build, checked):
    assert_tensor_cores_and_no_atomics(build, checked)


# ---------------------------------------------------------------- U, dB, dA


def expand_backward(dtype, m, r, *, needs=(True, True, True, True), gain=True, adapters=0, n=4096):
    routed = route(adapters, m) if adapters else []
    b, dy = empty(max(1, adapters), n, r), empty(m, n, dtype=dtype)
    args = (empty(m, r), b, empty(n) if gain else None, dy, 2.0, routed, needs)
    name = (
        f"{NAMES[dtype]}-M{m}-r{r}-{''.join(map(str, map(int, needs)))}"
        + "-gain" * gain
        + "-routed" * bool(adapters)
    )
    return case(name, lambda: lora_backward.expand_backward(dy, *args))


def shrink_backward(dtype, m, ranks, *, p=0.0, adapters=0):
    routed, seeds = (
        route(adapters, m) if adapters else [],
        empty(3, dtype=torch.int64) if p else None,
    )
    args = (empty(m, 4096, dtype=dtype), ranks, max(1, adapters), p, seeds, routed, FP32)
    run = lambda: lora_backward.shrink_backward(empty(m, sum(ranks)), *args)  # noqa: E731
    return f"{NAMES[dtype]}-M{m}-{ranks}" + "-dropout" * bool(p) + "-routed" * bool(adapters), run


@every_capability(
    [
        expand_backward(BF16, 8192, 16),
        expand_backward(BF16, 8192, 64),
        expand_backward(FP16, 8192, 64, needs=(True, True, False, False), adapters=20, gain=False),
        expand_backward(FP32, 512, 64),
        case(*shrink_backward(BF16, 8192, [16, 16, 16], p=0.1)),
        case(*shrink_backward(BF16, 8192, [64], p=0.1)),
        case(*shrink_backward(FP16, 512, [16], adapters=20)),
        case(*shrink_backward(FP32, 512, [16], p=0.1)),
    ]
)
def test_one_pass_over_x_or_dy_compiles_well(build, checked):
    assert_tensor_cores_and_no_atomics(build, checked)


@every_capability(
    [
        last_case(*shrink_backward(BF16, 8192, [16])),
        last_case(*shrink_backward(BF16, 8192, [16], adapters=20)),
    ]
    + [
        case(
            f"squares-{name}",
            lambda base=base, size=size: lora.row_squares(base, (4096, 4096), size),
        )
        for name, base, size in [
            ("nf4", state(4096, 4096), 64),
            ("dense", [empty(4096, 4096, dtype=BF16)], 0),
        ]
    ]
)
def test_sums_use_no_atomics(checked):
    assert not has_atomics(checked)
