"""NF4 beside bitsandbytes: the same bytes, the same values, and an error that is never larger."""

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from helpers.nf4_cases import assert_same_state, case
from helpers.tolerance import DTYPES, relative_error

import pyfast
from pyfast import reference
from pyfast.formats import nf4_codebooks


def weights(case_name: str, shape=(37, 96)) -> torch.Tensor:
    w = torch.randn(shape)
    flat = w.view(-1)
    if case_name == "zero-block":
        flat[64:192] = 0
        flat[-1:] = 0
    elif case_name == "all-zero":
        w.zero_()
    elif case_name == "constant":
        w.fill_(0.37)
    elif case_name == "tiny":
        w *= 1e-30
    elif case_name == "below-smallest":
        w *= 1e-39
    elif case_name == "huge":
        w *= 1e30
    elif case_name == "outliers":
        flat[::61] *= 1000
    elif case_name == "on-thresholds":
        codes = nf4_codebooks.CODE["nf4"]
        flat.copy_(
            torch.cat([codes, nf4_codebooks.THRESHOLDS["nf4"], torch.ones(1)]).repeat(
                len(flat) // 32 + 1
            )[: len(flat)]
        )
    return w


@pytest.fixture(autouse=True)
def mean_on_the_cpu(monkeypatch):
    """Add the scales up on the CPU, as bitsandbytes does here; a GPU has another order."""
    mean = reference.mean_absmax
    monkeypatch.setattr(
        reference, "mean_absmax", lambda absmax: mean(absmax.cpu()).to(absmax.device)
    )


CASES = [
    "random",
    "zero-block",
    "all-zero",
    "constant",
    "tiny",
    "below-smallest",
    "huge",
    "outliers",
    "on-thresholds",
]


def bnb_state(packed, state):
    if not state.nested:
        return [packed, state.absmax, state.code]
    return [packed, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]


def bnb_quant_state(w: pyfast.NF4Weight, dtype) -> bnb.QuantState:
    """Return bitsandbytes' state of a nested weight."""
    scales = bnb.QuantState(
        absmax=w.nested_absmax, code=w.nested_code, blocksize=256, dtype=torch.float32
    )
    return bnb.QuantState(
        w.absmax,
        w.shape,
        w.code,
        w.blocksize,
        w.quant_type,
        dtype,
        offset=w.offset[0],
        state2=scales,
    )


def bnb_values(packed, state):
    """Decode a weight with bitsandbytes, as one row: its AVX-512 code begins a block in each row."""
    shape, state.shape = state.shape, (state.shape.numel(),)
    values = bnb.dequantize_4bit(packed, state).view(shape)
    state.shape = shape
    return values


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", nf4_codebooks.QUANT_TYPES)
@pytest.mark.parametrize("case_name", CASES)
def test_bytes_are_bitsandbytes(device, case_name, quant_type, nested):
    for shape in [(37, 96), (64, 64), (5, 7), (129, 257)]:
        w = weights(case_name, shape)
        packed, state = bnb.quantize_4bit(w, quant_type=quant_type, compress_statistics=nested)
        pyfast_result = pyfast.nf4_quantize(w.to(device), nested=nested, quant_type=quant_type)
        assert_same_state(pyfast_result.state, bnb_state(packed, state))
        assert torch.equal(pyfast.nf4_dequantize(pyfast_result).cpu(), bnb_values(packed, state))


@pytest.mark.parametrize("blocksize", nf4_codebooks.BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_bitsandbytes_for_every_block_size(device, dtype, blocksize):
    for shape in [(64, 2 * blocksize), (3, blocksize + 1), (1, 40)]:
        w = torch.randn(shape, dtype=dtype)
        packed, state = bnb.quantize_4bit(
            w, blocksize=blocksize, quant_type="nf4", compress_statistics=True
        )
        pyfast_result = pyfast.nf4_quantize(w.to(device), blocksize=blocksize)
        assert_same_state(pyfast_result.state, bnb_state(packed, state))
        for out in DTYPES:
            state.dtype = out
            assert torch.equal(
                pyfast.nf4_dequantize(pyfast_result, out).cpu(), bnb_values(packed, state)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 6, 200])
def test_error_is_never_above_bitsandbytes(device, dtype, m):
    x, w, _, values = case((256, 512), dtype, device, m=(m,), bias=False)
    x.requires_grad_()
    bnb_result = bitsandbytes.matmul_4bit(x, w.packed.t(), bnb_quant_state(w, dtype))
    pyfast_result = pyfast.nf4_linear(x, w)
    dy = torch.randn_like(pyfast_result)
    exact, exact_dx = x.double() @ values.t(), dy.double() @ values
    # Two float32 sums in different orders err by different last bits, whichever is luckier.
    slack = 1.02 if dtype != torch.float32 else 2.5
    assert relative_error(pyfast_result, exact) <= slack * relative_error(bnb_result, exact)
    pyfast_dx, bnb_dx = (torch.autograd.grad(y, x, dy)[0] for y in (pyfast_result, bnb_result))
    assert relative_error(pyfast_dx, exact_dx) <= slack * relative_error(bnb_dx, exact_dx)


@pytest.mark.parametrize("size", [3.0, 300.0, 1e4, 1e6])
@pytest.mark.parametrize("every", [2, 4, 16, 61])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_large_inputs_do_not_drown_small_ones(device, m, every, size):
    """Inputs a thousand times the others, as in language models, meet weights that are zero."""
    dtype = torch.bfloat16
    dense = torch.randn(256, 512, device=device)
    dense[:, ::every] = 0
    x = torch.randn(m, 512, device=device).to(dtype)
    x[:, ::every] = x[:, ::every].sign() * size
    for quant_type in nf4_codebooks.QUANT_TYPES:
        w = pyfast.nf4_quantize(dense, quant_type=quant_type)
        exact = x.double() @ reference.nf4_dequantize(w, torch.float32).double().t()
        bnb_result = bitsandbytes.matmul_4bit(x, w.packed.t(), bnb_quant_state(w, dtype))
        assert relative_error(pyfast.nf4_linear(x, w), exact) <= 1.02 * relative_error(
            bnb_result, exact
        )
