"""nf4_quantize, nf4_dequantize, nf4_linear against the reference."""

import pytest
import torch
import torch.nn.functional as F
from helpers.nf4_cases import assert_same_state, case
from helpers.tolerance import DTYPES, MEMORY_GB, assert_as_exact_as_torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast import reference
from pyfast.formats import nf4_codebooks
from pyfast.ops.registered import nf4 as registered

SHAPES = {  # (out, in)
    "one": (1, 1),
    "block": (1, 64),
    "block+1": (1, 65),
    "odd": (7, 13),
    "odd-rows-straddle": (33, 95),
    "even-straddle": (48, 100),
    "aligned": (64, 128),
    "wide": (3, 1024),
    "tall": (515, 64),
}


# --- quantize ---


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 3000),
    blocksize=st.sampled_from(nf4_codebooks.BLOCKSIZES),
    nested=st.booleans(),
    quant_type=st.sampled_from(nf4_codebooks.QUANT_TYPES),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_quantize_is_the_reference(size, blocksize, nested, quant_type, exponent, seed):
    w = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    options = {"blocksize": blocksize, "nested": nested, "quant_type": quant_type}
    ours, exact = pyfast.nf4_quantize(w, **options), reference.nf4_quantize(w, **options)
    assert_same_state(ours.state, exact.state)
    assert torch.equal(pyfast.nf4_dequantize(ours), reference.nf4_dequantize(exact))


def test_a_value_is_off_by_half_a_step_at_most(device):
    w = torch.randn(64, 64, device=device)
    for quant_type in nf4_codebooks.QUANT_TYPES:
        q = pyfast.nf4_quantize(w, nested=False, quant_type=quant_type)
        widest = nf4_codebooks.CODE[quant_type].sort().values.diff().max() / 2
        assert (
            (pyfast.nf4_dequantize(q) - w).abs() <= widest.to(device) * q.absmax[:, None] * 1.0001
        ).all()


def test_quantize_takes_any_strides(device):
    w = torch.randn(96, 130, device=device)
    for view in (w.t(), w[::3], w[:, 1::2], w[:1].expand(5, 130)):
        assert_same_state(
            pyfast.nf4_quantize(view).state, pyfast.nf4_quantize(view.contiguous()).state
        )


def test_quantize_nothing(device):
    for shape in [(0, 64), (64, 0), (0,)]:
        q = pyfast.nf4_quantize(torch.empty(shape, device=device))
        assert pyfast.nf4_dequantize(q).shape == shape


# --- linear ---


def ideal_torch(x, values, b, dy):
    """What torch gets in x's dtype where its matmul accumulates in float32: y, dx and, with a bias, db."""
    x, values, dy, dtype = x.detach().float(), values.float(), dy.float(), x.dtype
    results = [F.linear(x, values, None if b is None else b.detach().float()), dy @ values]
    if b is not None:
        results.append(dy.reshape(-1, dy.shape[-1]).sum(0))
    return [result.to(dtype) for result in results]


def check_linear(x, w, b, values):
    """Forward and all gradients, by the tolerance rule."""
    x = x.detach().requires_grad_()
    b = None if b is None else b.detach().requires_grad_()
    leaves = [x] if b is None else [x, b]
    y = pyfast.nf4_linear(x, w, b)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)

    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = F.linear(exact_leaves[0], values, exact_leaves[1] if b is not None else None)
    exact_grads = torch.autograd.grad(exact, exact_leaves, dy.double())
    torchs, *torchs_grads = ideal_torch(x, values.to(x.dtype), b, dy)
    assert_as_exact_as_torch(y, torchs, exact)
    for ours, theirs, true in zip(grads, torchs_grads, exact_grads):
        assert_as_exact_as_torch(ours, theirs, true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear(device, shape, dtype):
    for m in (1, 2, 3, 8, 17, 64, 130):  # either side of every change of path
        for nested in (True, False):
            check_linear(*case(shape, dtype, device, m=(m,), nested=nested, bias=m % 2 == 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_a_real_size(device, dtype):
    for m in (1, 4, 16, 256):
        check_linear(*case((768, 1024), dtype, device, m=(m,)))


@pytest.mark.parametrize("quant_type", nf4_codebooks.QUANT_TYPES)
@pytest.mark.parametrize("blocksize", nf4_codebooks.BLOCKSIZES)
def test_linear_for_every_block_size(device, blocksize, quant_type):
    for m in (1, 40):
        for shape in [(24, 4096), (70, 202)]:
            check_linear(
                *case(
                    shape, torch.float32, device, m=(m,), blocksize=blocksize, quant_type=quant_type
                )
            )


@pytest.mark.parametrize("m", [(0,), (2, 0, 3), (2, 3, 4), ()], ids=str)
def test_linear_keeps_leading_dimensions(device, m):
    check_linear(*case((10, 66), torch.float32, device, m=m))


def test_linear_takes_a_strided_bias(device):
    x, w, _, _ = case((24, 66), torch.float32, device)
    b = torch.randn(48, device=device)[::2]
    assert torch.equal(pyfast.nf4_linear(x, w, b), pyfast.nf4_linear(x, w, b.clone()))


def test_linear_of_nothing(device):
    for shape in [(0, 64), (64, 0)]:
        x, w, b, _ = case(shape, torch.float32, device)
        assert torch.equal(pyfast.nf4_linear(x, w, b), b.expand(5, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_takes_any_strides(device, dtype):
    x, w, b, values = case((34, 66), dtype, device, m=(9,))
    huge = torch.empty(9, 1 << 16, dtype=dtype, device=device)[:, :66].copy_(x)
    for view in (x.t().contiguous().t(), huge, x[::2], x[:1].expand(4, 66)):
        check_linear(view, w, b, values)
    dy = torch.randn(34, 9, dtype=dtype, device=device).t()
    x.requires_grad_()
    dx = torch.autograd.grad(pyfast.nf4_linear(x, w), x, dy)[0]
    assert torch.equal(dx, torch.autograd.grad(pyfast.nf4_linear(x, w), x, dy.contiguous())[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(device, dtype):
    for m in (1, 5, 64):
        x, w, b, _ = case((130, 257), dtype, device, m=(m,))
        x.requires_grad_()
        runs = []
        for _ in range(3):
            y = pyfast.nf4_linear(x, w, b)
            runs.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("m", [1, 3, 40])
def test_nan_in_nan_out(device, m):
    x, w, b, _ = case((34, 66), torch.float32, device, m=(m,))
    x[0, 5] = float("nan")
    y = pyfast.nf4_linear(x, w, b)
    assert y[0].isnan().all() and not y[1:].isnan().any()
    x[0, 5], b[2] = 0, float("nan")
    assert pyfast.nf4_linear(x, w, b).isnan().nonzero()[:, 1].unique().tolist() == [2]
    absmax = w.nested_absmax.clone().fill_(float("inf"))
    broken = pyfast.NF4Weight(
        w.packed, w.absmax, w.code, w.shape, 64, w.dtype, "nf4", absmax, w.nested_code, w.offset
    )
    assert not pyfast.nf4_dequantize(broken).isfinite().any()


def test_frozen_inputs_cost_nothing(device, monkeypatch):
    x, w, b, _ = case((34, 66), torch.float32, device)
    b.requires_grad_()
    calls = []
    monkeypatch.setattr(registered, "linear_backward", lambda *args: calls.append(args))
    pyfast.nf4_linear(x, w, b).sum().backward()
    assert torch.allclose(b.grad, torch.full_like(b, 5)) and not calls


@pytest.mark.skipif(MEMORY_GB < 14, reason="needs 14 GB of memory")
def test_more_than_2_31_elements(device):
    rows, cols = 32769, 65536
    w = torch.zeros(rows, cols, dtype=torch.float16, device=device)
    w[-1] = torch.randn(cols).half()
    w[0, :64] = 1
    q = pyfast.nf4_quantize(w, nested=False)
    del w
    last = pyfast.NF4Weight(
        q.packed[-cols // 2 :], q.absmax[-cols // 64 :], q.code, (1, cols), 64, torch.float16, "nf4"
    )
    x = torch.randn(1, cols, device=device)
    y = pyfast.nf4_linear(x, q)
    assert torch.allclose(y[:, -1:], reference.nf4_linear(x, last), atol=1e-2)
    assert torch.allclose(y[0, 0], x[0, :64].sum(), atol=1e-3) and not y[0, 1:-1].any()
    dy = torch.zeros(1, rows, device=device)
    dy[0, -1] = 2
    dx = torch.ops.pyfast.nf4_linear_backward(dy, q.state, q.shape, 64)
    assert torch.allclose(dx, 2 * reference.nf4_dequantize(last, torch.float32))
