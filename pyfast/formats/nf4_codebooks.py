"""The tables behind the 4-bit formats and their 8-bit scales: data that every path, CPU or GPU, is
handed.

Made once, at import, with every dtype and device spelled out: nobody's defaults reach them.
"""

import torch
from torch import Tensor

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = tuple(2**i for i in range(5, 13))
NESTED_BLOCKSIZE = 256
SMALLEST_ABSMAX = 1e-38  # scales below count as this one, so that 1 / absmax stays finite

# The quantiles of a standard normal, scaled to [-1, 1] (Dettmers et al., QLoRA, 2023).
_NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
    + (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
    + (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)
# Sign, two bits of exponent, one of mantissa, in bitsandbytes' order; 12 is the largest.
_FP4_TIMES_12 = (0, 0.0625, 8, 12, 4, 6, 2, 3)


def _tensor(values, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def _midpoints(ascending: Tensor) -> Tensor:
    return (ascending[:-1] + ascending[1:]) / 2


def _dynamic_code() -> Tensor:
    """Seven decades, each cut finer than the one below, with both signs; 0 and 1."""
    values = [_tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = _midpoints(edges) * 10.0 ** (i - 6)
        values += [means, -means]
    return torch.cat(values).sort().values


def _float_of_rank(rank: Tensor) -> Tensor:
    """Floats in ascending order, numbered: 0 is 0.0, 1 the next above."""
    bits = torch.where(rank < 0, -rank - 2**31, rank)
    return bits.to(torch.int32).view(torch.float32)


def _steps_of_grid(table: Tensor) -> Tensor:
    """The largest float that encodes below each code, by bisection over the bits of a float.

    bitsandbytes rounds d to one of 65536 grid points and takes the code nearest to that: a step
    function of d.
    """
    grid = torch.arange(65536, dtype=torch.float32, device="cpu") * 2 / 65535 - 1
    nearest = torch.bucketize(grid, _midpoints(table))
    steps = torch.arange(1, 256, dtype=torch.int64, device="cpu")
    one = 0x3F800000  # the bits of 1.0
    low, high = torch.full_like(steps, -one), torch.full_like(steps, one)
    for _ in range(32):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = nearest[((_float_of_rank(middle) + 1) * 0.5 * 65535 + 0.5).long()] >= steps
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return _float_of_rank(low)


_fp4 = _tensor(_FP4_TIMES_12) / 12
# The 16 values of a 4-bit code. FP4 has two zeros, told apart by their sign.
CODE = {"nf4": _tensor(_NF4), "fp4": torch.cat([_fp4, -_fp4])}
# The codes by ascending value; of FP4's zeros the one without a sign comes first. uint8 [16]
ORDER = {name: torch.argsort(code, stable=True).to(torch.uint8) for name, code in CODE.items()}
# x encodes as ORDER[number of thresholds below x]. [15]
THRESHOLDS = {name: _midpoints(code[ORDER[name].long()]) for name, code in CODE.items()}
# The 256 values of the dynamic 8-bit code, and the 255 thresholds: d encodes as the number of those
# below it.
NESTED_CODE = _dynamic_code()
NESTED_THRESHOLDS = _steps_of_grid(NESTED_CODE)
