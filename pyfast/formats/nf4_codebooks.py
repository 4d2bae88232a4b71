"""Tables of the 4-bit formats and of their 8-bit scales, which every CPU and GPU path takes.

They are computed once, at import. Every dtype and device is explicit, so that torch's defaults,
which a program may change, have no effect.
"""

import torch
from torch import Tensor

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = tuple(2**i for i in range(5, 13))
NESTED_BLOCKSIZE = 256
# Smaller scales count as this one, so that 1 / absmax stays finite.
SMALLEST_ABSMAX = 1e-38

# The quantiles of a standard normal, scaled to [-1, 1] (Dettmers et al., QLoRA, 2023).
_NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
    + (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
    + (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)
# A sign, two bits of exponent, one of mantissa, in bitsandbytes' order; the largest value is 12.
_FP4_TIMES_12 = (0, 0.0625, 8, 12, 4, 6, 2, 3)


def _tensor(values, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def _midpoints(ascending: Tensor) -> Tensor:
    return (ascending[:-1] + ascending[1:]) / 2


def _dynamic_code() -> Tensor:
    """Return the 8-bit code: 0, 1, and values of both signs in seven decades.

    Each decade has twice as many values as the one below it.
    """
    values = [_tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = _midpoints(edges) * 10.0 ** (i - 6)
        values += [means, -means]
    return torch.cat(values).sort().values


def _float_of_rank(rank: Tensor) -> Tensor:
    """Return the float of each rank in ascending order: rank 0 is 0.0, rank 1 the next above."""
    bits = torch.where(rank < 0, -rank - 2**31, rank)
    return bits.to(torch.int32).view(torch.float32)


def _steps_of_grid(table: Tensor) -> Tensor:
    """Return the largest float that encodes below each code, by bisection over a float's bits.

    bitsandbytes rounds a value to one of 65536 grid points, then takes the code nearest to that
    point. The code is therefore a step function of the value.
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
# The 16 values of a 4-bit code. FP4 has two zeros, which differ in their sign.
CODE = {"nf4": _tensor(_NF4), "fp4": torch.cat([_fp4, -_fp4])}
# The codes by ascending value, uint8 [16]. FP4's positive zero comes before its negative one.
ORDER = {name: torch.argsort(code, stable=True).to(torch.uint8) for name, code in CODE.items()}
# The thresholds between neighboring values, [15]: x encodes as ORDER[number of thresholds below x].
THRESHOLDS = {name: _midpoints(code[ORDER[name].long()]) for name, code in CODE.items()}
# The 256 values of the dynamic 8-bit code, and its 255 thresholds: a value encodes as the number of
# thresholds below it.
NESTED_CODE = _dynamic_code()
NESTED_THRESHOLDS = _steps_of_grid(NESTED_CODE)
