"""Random problems for NF4's linear layers."""

import torch

import pyfast
from pyfast import reference


def assert_same_state(ours, theirs):
    for name, a, b in zip(
        ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset"), ours, theirs
    ):
        assert a.dtype == b.dtype and torch.equal(a.cpu().reshape(-1), b.cpu().reshape(-1)), name


def case(shape, dtype, device, *, m=(5,), nested=True, bias=True, blocksize=64, quant_type="nf4"):
    """(x, w, bias) and the weight's exact values."""
    w = pyfast.nf4_quantize(
        torch.randn(shape, device=device), nested=nested, blocksize=blocksize, quant_type=quant_type
    )
    x = torch.randn(*m, shape[1], device=device).to(dtype)
    b = torch.randn(shape[0], device=device).to(dtype) if bias else None
    return x, w, b, reference.nf4_dequantize(w, torch.float32).double()
