"""Bad input: an error that names the argument, what it was and what it must be, before any kernel runs."""

import math

import pytest
import torch
from torch import nn

import pyfast

W = pyfast.nf4_quantize(torch.randn(24, 70))
X = torch.randn(3, 70)
A = (
    torch.randn(8, 70),
    torch.randn(8),
    torch.randn(70, 8),
    torch.randn(70),
)  # an adapter's parameters

BAD = {
    "block size a float": (
        lambda: pyfast.nf4_quantize(X, blocksize=64.0),
        TypeError,
        "blocksize must be a int, not float",
    ),
    "nested a string": (
        lambda: pyfast.nf4_quantize(X, nested="no"),
        TypeError,
        "nested must be a bool, not str",
    ),
    "features a float": (
        lambda: pyfast.NF4Linear(8.0, 8),
        ValueError,
        "in_features is 8.0; it must be an integer",
    ),
    "from_weight, bias": (
        lambda: pyfast.NF4Linear.from_weight(W, torch.zeros(3)),
        ValueError,
        r"bias has shape \[3\]",
    ),
    "from_weight, 3-D": (
        lambda: pyfast.NF4Linear.from_weight(pyfast.nf4_quantize(torch.randn(2, 3, 4))),
        ValueError,
        r"w has shape \[2, 3, 4\]",
    ),
    "state: strided": (
        lambda: pyfast.NF4Weight(
            W.packed,
            torch.stack([W.absmax] * 2, -1)[:, 0],
            *W.state[2:3],
            W.shape,
            64,
            W.dtype,
            "nf4",
            *W.state[3:],
        ),
        ValueError,
        "absmax has strides",
    ),
    "weight not a tensor": (
        lambda: pyfast.nf4_quantize([1.0]),
        TypeError,
        "weight must be a torch.Tensor, not list",
    ),
    "weight of ints": (
        lambda: pyfast.nf4_quantize(torch.ones(4, dtype=torch.int8)),
        TypeError,
        "weight is torch.int8; it must be torch.float32",
    ),
    "weight double": (
        lambda: pyfast.nf4_quantize(torch.ones(4).double()),
        TypeError,
        "weight is torch.float64",
    ),
    "weight NaN": (
        lambda: pyfast.nf4_quantize(torch.full((3, 5), math.nan)),
        ValueError,
        "weight holds NaN",
    ),
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
    "block size": (
        lambda: pyfast.nf4_quantize(X, blocksize=48),
        ValueError,
        "blocksize is 48; it must be 32, 64",
    ),
    "quant type": (
        lambda: pyfast.nf4_quantize(X, quant_type="int4"),
        ValueError,
        "quant_type is 'int4'; it must be 'nf4' or 'fp4'",
    ),
    "dequantize a tensor": (
        lambda: pyfast.nf4_dequantize(X),
        TypeError,
        "w must be a NF4Weight, not Tensor",
    ),
    "dequantize to int": (
        lambda: pyfast.nf4_dequantize(W, torch.int8),
        ValueError,
        "dtype is torch.int8",
    ),
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
    "w dense": (
        lambda: pyfast.nf4_linear(X, torch.randn(24, 70)),
        TypeError,
        "w must be a NF4Weight",
    ),
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
    "module block size": (
        lambda: pyfast.NF4Linear(8, 8, blocksize=8),
        ValueError,
        "blocksize is 8",
    ),
    "module dtype": (
        lambda: pyfast.NF4Linear(8, 8, dtype=torch.int8),
        ValueError,
        "dtype is torch.int8",
    ),
    "state: packed cut": (
        lambda: pyfast.NF4Weight(
            W.packed[:-1],
            W.absmax,
            W.code,
            W.shape,
            64,
            W.dtype,
            "nf4",
            W.nested_absmax,
            W.nested_code,
            W.offset,
        ),
        ValueError,
        "packed has shape",
    ),
    "state: absmax dtype": (
        lambda: pyfast.NF4Weight(W.packed, W.absmax, W.code, W.shape, 64, W.dtype, "nf4"),
        TypeError,
        "absmax is torch.uint8; it must be torch.float32",
    ),
    "adapter: x not a tensor": (
        lambda: pyfast.adapter(None, *A),
        TypeError,
        "x must be a torch.Tensor, not NoneType",
    ),
    "adapter: x of ints": (lambda: pyfast.adapter(X.int(), *A), TypeError, "x is torch.int32"),
    "adapter: x too short": (
        lambda: pyfast.adapter(X[:, :69], *A),
        ValueError,
        r"x has shape \[3, 69\]; its last dimension must be 70, the width of down_weight",
    ),
    "adapter: down_weight a vector": (
        lambda: pyfast.adapter(X, A[1], *A[1:]),
        ValueError,
        r"down_weight has shape \[8\]; it must be a matrix",
    ),
    "adapter: no bottleneck": (
        lambda: pyfast.adapter(X, A[0][:0], None, A[2][:, :0], None),
        ValueError,
        r"down_weight has shape \[0, 70\]; the bottleneck must be at least 1 wide",
    ),
    "adapter: down_bias": (
        lambda: pyfast.adapter(X, A[0], A[3], *A[2:]),
        ValueError,
        r"down_bias has shape \[70\]; it must be \[8\]",
    ),
    "adapter: up_weight": (
        lambda: pyfast.adapter(X, *A[:2], A[0], A[3]),
        ValueError,
        r"up_weight has shape \[8, 70\]; it must be \[70, 8\]",
    ),
    "adapter: up_bias": (
        lambda: pyfast.adapter(X, *A[:3], A[1]),
        ValueError,
        r"up_bias has shape \[8\]; it must be \[70\]",
    ),
    "adapter: up_weight dtype": (
        lambda: pyfast.adapter(X, *A[:2], A[2].half(), A[3]),
        TypeError,
        "up_weight is torch.float16; it must be torch.float32 or x's dtype",
    ),
    "adapter: up_weight elsewhere": (
        lambda: pyfast.adapter(X, *A[:2], A[2].to("meta"), A[3]),
        ValueError,
        "up_weight is on meta but x is on cpu",
    ),
    "adapter: residual": (
        lambda: pyfast.adapter(X, *A, residual=X[:2]),
        ValueError,
        r"residual has shape \[2, 70\]; it must be \[3, 70\]",
    ),
    "adapter: activation": (
        lambda: pyfast.adapter(X, *A, activation="swish"),
        ValueError,
        "activation is 'swish'; it must be 'relu', 'gelu', 'gelu_tanh', 'silu' or 'tanh'",
    ),
    "adapter: scaling NaN": (
        lambda: pyfast.adapter(X, *A, scaling=math.nan),
        ValueError,
        "scaling is nan; it must be a finite number",
    ),
    "adapter: scaling a tensor": (
        lambda: pyfast.adapter(X, *A, scaling=X),
        TypeError,
        "scaling must be a number, not Tensor",
    ),
    "Adapter: activation": (
        lambda: pyfast.Adapter(8, activation="swish"),
        ValueError,
        "activation is 'swish'",
    ),
    "Adapter: init": (
        lambda: pyfast.Adapter(8, init="zero"),
        ValueError,
        "init is 'zero'; it must be 'houlsby' or 'lora'",
    ),
    "Adapter: width": (
        lambda: pyfast.Adapter(8.0),
        ValueError,
        "width is 8.0; it must be an integer",
    ),
    "Adapter: bottleneck": (
        lambda: pyfast.Adapter(8, 0),
        ValueError,
        "bottleneck is 0; it must be at least 1",
    ),
    "Adapter: reduction": (
        lambda: pyfast.Adapter(8, reduction=0),
        ValueError,
        "reduction is 0; it must be at least 1",
    ),
    "Adapter: scaling": (lambda: pyfast.Adapter(8, scaling=math.inf), ValueError, "scaling is inf"),
    "Adapter: x": (
        lambda: pyfast.Adapter(8)(X),
        ValueError,
        "its last dimension must be 8, the adapter's width",
    ),
}


@pytest.mark.parametrize("call, kind, message", BAD.values(), ids=BAD.keys())
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


OP = torch.ops.pyfast.nf4_linear
ADAPTER, ADAPTER_BACKWARD = torch.ops.pyfast.adapter, torch.ops.pyfast.adapter_backward
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
    "strided packed": lambda: OP(
        X, [torch.zeros(1680, 1, dtype=torch.uint8)[::2], *W.state[1:]], None, W.shape, 64
    ),
    "bias too short": lambda: OP(X, W.state, torch.zeros(3), W.shape, 64),
    "x of ints": lambda: OP(X.int(), W.state, None, W.shape, 64),
    "dy too short": lambda: torch.ops.pyfast.nf4_linear_backward(X, W.state, W.shape, 64),
    "thresholds too short": lambda: torch.ops.pyfast.nf4_quantize(
        X, X[0, :3], W.packed[:16, 0], X[0], 64, True
    ),
    "adapter, up cut": lambda: ADAPTER(X, *A[:2], A[2][:, :7], A[3], None, "relu", 1.0),
    "adapter, bias cut": lambda: ADAPTER(X, A[0], A[1][:7], *A[2:], None, "relu", 1.0),
    "adapter, residual cut": lambda: ADAPTER(X, *A, X[:2], "relu", 1.0),
    "adapter, meta": lambda: ADAPTER(X, A[0].to("meta"), *A[1:], None, "relu", 1.0),
    "adapter, ints": lambda: ADAPTER(X, A[0].int(), *A[1:], None, "relu", 1.0),
    "adapter, activation": lambda: ADAPTER(X, *A, None, "swish", 1.0),
    "adapter, no bottleneck": lambda: ADAPTER(
        X, A[0][:0], None, A[2][:, :0], None, None, "relu", 1.0
    ),
    "adapter backward, dy cut": lambda: ADAPTER_BACKWARD(
        X[:2], X, *A[:3], True, "relu", 1.0, [True] * 5
    ),
    "adapter backward, widths": lambda: ADAPTER_BACKWARD(
        X[:, :60], X, *A[:2], A[2][:60], True, "relu", 1.0, [True] * 5
    ),
}


@pytest.mark.parametrize("call", RAW.values(), ids=RAW.keys())
def test_bad_raw_op_is_an_exception_not_a_crash(call):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        call()


def test_a_forced_path_must_exist(monkeypatch):
    monkeypatch.setenv("PYFAST_NF4_PATH", "fussed")
    with pytest.raises(
        ValueError, match="PYFAST_NF4_PATH is 'fussed'; it must be 'gemv', 'fused' or 'panel'"
    ):
        pyfast.ops.registered.nf4.forced_path()


def test_forward_mode_is_refused_not_dropped():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        pyfast.nf4_linear(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)), W)
