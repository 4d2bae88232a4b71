"""Bad input: an error that names the argument, what it was and what it must be, before any kernel runs."""

import math

import pytest
import torch
from torch import nn

import pyfast

W = pyfast.nf4_quantize(torch.randn(24, 70))
X = torch.randn(3, 70)

BAD = {
    "block size a float": (
        lambda: pyfast.nf4_quantize(X, blocksize=64.0),
        TypeError,
        "blocksize must be a int, not float",
    ),
    "nested a string": (lambda: pyfast.nf4_quantize(X, nested="no"), TypeError, "nested must be a bool, not str"),
    "features a float": (lambda: pyfast.NF4Linear(8.0, 8), ValueError, "in_features is 8.0; it must be an integer"),
    "from_weight, bias": (lambda: pyfast.NF4Linear.from_weight(W, torch.zeros(3)), ValueError, r"bias has shape \[3\]"),
    "from_weight, 3-D": (
        lambda: pyfast.NF4Linear.from_weight(pyfast.nf4_quantize(torch.randn(2, 3, 4))),
        ValueError,
        r"w has shape \[2, 3, 4\]",
    ),
    "state: strided": (
        lambda: pyfast.NF4Weight(
            W.packed, torch.stack([W.absmax] * 2, -1)[:, 0], *W.state[2:3], W.shape, 64, W.dtype, "nf4", *W.state[3:]
        ),
        ValueError,
        "absmax has strides",
    ),
    "weight not a tensor": (lambda: pyfast.nf4_quantize([1.0]), TypeError, "weight must be a torch.Tensor, not list"),
    "weight of ints": (
        lambda: pyfast.nf4_quantize(torch.ones(4, dtype=torch.int8)),
        TypeError,
        "weight is torch.int8; it must be torch.float32",
    ),
    "weight double": (lambda: pyfast.nf4_quantize(torch.ones(4).double()), TypeError, "weight is torch.float64"),
    "weight NaN": (lambda: pyfast.nf4_quantize(torch.full((3, 5), math.nan)), ValueError, "weight holds NaN"),
    "weight NaN, plain": (
        lambda: pyfast.nf4_quantize(torch.full((3, 5), math.nan), nested=False),
        ValueError,
        "weight holds NaN",
    ),
    "weight inf": (
        lambda: pyfast.nf4_quantize(torch.tensor([[1.0, math.inf]])),
        ValueError,
        "weight holds NaN, infinite",
    ),
    "block size": (lambda: pyfast.nf4_quantize(X, blocksize=48), ValueError, "blocksize is 48; it must be 32, 64"),
    "quant type": (
        lambda: pyfast.nf4_quantize(X, quant_type="int4"),
        ValueError,
        "quant_type is 'int4'; it must be 'nf4' or 'fp4'",
    ),
    "dequantise a tensor": (lambda: pyfast.nf4_dequantize(X), TypeError, "w must be a NF4Weight, not Tensor"),
    "dequantise to int": (lambda: pyfast.nf4_dequantize(W, torch.int8), ValueError, "dtype is torch.int8"),
    "x not a tensor": (lambda: pyfast.nf4_linear([1.0], W), TypeError, "x must be a torch.Tensor"),
    "x of ints": (lambda: pyfast.nf4_linear(X.int(), W), TypeError, "x is torch.int32"),
    "x too short": (
        lambda: pyfast.nf4_linear(X[:, :69], W),
        ValueError,
        r"x has shape \[3, 69\]; its last dimension must be 70",
    ),
    "x a scalar": (lambda: pyfast.nf4_linear(X[0, 0], W), ValueError, r"x has shape \[\]"),
    "x elsewhere": (
        lambda: pyfast.nf4_linear(X.to("meta"), W),
        ValueError,
        "w is on cpu but x is on meta|x is on meta but w is on cpu",
    ),
    "w dense": (lambda: pyfast.nf4_linear(X, torch.randn(24, 70)), TypeError, "w must be a NF4Weight"),
    "w not a matrix": (
        lambda: pyfast.nf4_linear(X, pyfast.nf4_quantize(torch.randn(2, 24, 70))),
        ValueError,
        r"w has shape \[2, 24, 70\]",
    ),
    "bias shape": (
        lambda: pyfast.nf4_linear(X, W, torch.zeros(23)),
        ValueError,
        r"bias has shape \[23\]; it must be \[24\]",
    ),
    "bias dtype": (
        lambda: pyfast.nf4_linear(X, W, torch.zeros(24).half()),
        TypeError,
        "bias is torch.float16 but x is torch.float32",
    ),
    "from_linear": (
        lambda: pyfast.NF4Linear.from_linear(nn.Conv1d(3, 3, 1)),
        TypeError,
        "linear must be a Linear, not Conv1d",
    ),
    "module block size": (lambda: pyfast.NF4Linear(8, 8, blocksize=8), ValueError, "blocksize is 8"),
    "module dtype": (lambda: pyfast.NF4Linear(8, 8, dtype=torch.int8), ValueError, "dtype is torch.int8"),
    "state: packed cut": (
        lambda: pyfast.NF4Weight(
            W.packed[:-1], W.absmax, W.code, W.shape, 64, W.dtype, "nf4", W.nested_absmax, W.nested_code, W.offset
        ),
        ValueError,
        "packed has shape",
    ),
    "state: absmax dtype": (
        lambda: pyfast.NF4Weight(W.packed, W.absmax, W.code, W.shape, 64, W.dtype, "nf4"),
        TypeError,
        "absmax is torch.uint8; it must be torch.float32",
    ),
}


@pytest.mark.parametrize("call, kind, message", BAD.values(), ids=BAD.keys())
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


OP = torch.ops.pyfast.nf4_linear
RAW = {
    "state on meta": lambda: OP(X, [t.to("meta") for t in W.state], None, W.shape, 64),
    "bias on meta": lambda: OP(X, W.state, torch.zeros(24, device="meta"), W.shape, 64),
    "no state": lambda: torch.ops.pyfast.nf4_dequantize([], [24, 70], 64, torch.float32),
    "short packed": lambda: OP(X, [W.packed[:-1], *W.state[1:]], None, W.shape, 64),
    "short absmax": lambda: OP(X, [W.packed, W.absmax[1:], *W.state[2:]], None, W.shape, 64),
    "short code": lambda: OP(X, [W.packed, W.absmax, W.code[:8], *W.state[3:]], None, W.shape, 64),
    "block size 0": lambda: OP(X, W.state, None, W.shape, 0),
    "negative shape": lambda: OP(X, W.state, None, [-24, -70], 64),
    "state of four": lambda: OP(X, W.state[:4], None, W.shape, 64),
    "strided packed": lambda: OP(X, [torch.zeros(1680, 1, dtype=torch.uint8)[::2], *W.state[1:]], None, W.shape, 64),
    "bias too short": lambda: OP(X, W.state, torch.zeros(3), W.shape, 64),
    "x of ints": lambda: OP(X.int(), W.state, None, W.shape, 64),
    "dy too short": lambda: torch.ops.pyfast.nf4_linear_backward(X, W.state, W.shape, 64),
    "thresholds too short": lambda: torch.ops.pyfast.nf4_quantize(X, X[0, :3], W.packed[:16, 0], X[0], 64, True),
}


@pytest.mark.parametrize("call", RAW.values(), ids=RAW.keys())
def test_bad_raw_op_is_an_exception_not_a_crash(call):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        call()


def test_a_forced_path_must_exist(monkeypatch):
    monkeypatch.setenv("PYFAST_NF4_PATH", "fussed")
    with pytest.raises(ValueError, match="PYFAST_NF4_PATH is 'fussed'; it must be 'gemv', 'fused' or 'panel'"):
        pyfast.nf4.forced_path()


def test_forward_mode_is_refused_not_dropped():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        pyfast.nf4_linear(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)), W)
