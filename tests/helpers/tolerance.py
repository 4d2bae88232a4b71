"""Devices, dtypes, and the one rule by which a result is judged."""

import os

import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


MEMORY_GB = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# An op may err, against float64, at most twice as much as plain torch does in the same dtype. The
# floor covers results that torch happens to get exactly right, in whose order of summation nobody
# else adds up: a few units in the last place of the largest value.
ALLOWED_ERROR_RATIO = 2.0


FLOOR = {
    torch.float64: 1e-14,
    torch.float32: 2.0**-21,
    torch.float16: 2.0**-12,
    torch.bfloat16: 2.0**-9,
}


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """||value - exact|| / ||exact|| in float64; of nothing, 0."""
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def assert_as_exact_as_torch(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
    """The tolerance rule."""
    assert ours.shape == exact.shape and ours.dtype == torchs.dtype and ours.device == torchs.device
    error, allowed = (
        relative_error(ours, exact),
        ALLOWED_ERROR_RATIO * relative_error(torchs, exact),
    )
    assert error <= allowed + FLOOR[ours.dtype], f"error {error:.3g}; torch's is {allowed / 2:.3g}"
