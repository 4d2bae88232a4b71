"""The tables behind the 4-bit formats and their 8-bit scales: data that every path, CPU or GPU, is handed."""

from functools import cache

import torch
from torch import Tensor

# The quantiles of a standard normal, scaled to [-1, 1] (Dettmers et al., QLoRA, 2023).
_NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
    + (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
    + (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)
# Sign, two bits of exponent, one of mantissa, in bitsandbytes' order; 12 is the largest.
_FP4_TIMES_12 = (0, 0.0625, 8, 12, 4, 6, 2, 3)

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = tuple(2**i for i in range(5, 13))
NESTED_BLOCKSIZE = 256
SMALLEST_ABSMAX = 1e-38  # scales below count as this one, so that 1 / absmax stays finite


@cache
def code(quant_type: str) -> Tensor:
    """The 16 values of a 4-bit code. [16]"""
    if quant_type == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    positive = torch.tensor(_FP4_TIMES_12, dtype=torch.float32)
    return torch.cat([positive, 0 - positive]) / 12  # no negative zero, as in bitsandbytes' files


@cache
def order(quant_type: str) -> Tensor:
    """The codes by ascending value; of FP4's two zeros the one without a sign comes first. uint8 [16]"""
    return torch.argsort(code(quant_type), stable=True).to(torch.uint8)


@cache
def thresholds(quant_type: str) -> Tensor:
    """x encodes as order[number of thresholds below x]. [15]"""
    ascending = code(quant_type)[order(quant_type).long()]
    return (ascending[:-1] + ascending[1:]) / 2


@cache
def nested_code() -> Tensor:
    """The 256 values of the dynamic 8-bit code: seven decades, each cut finer than the one below. [256]"""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [means, -means]
    return torch.cat(values).sort().values


@cache
def nested_thresholds() -> Tensor:
    """d encodes as the number of thresholds below d. [255]

    bitsandbytes rounds d to one of 65536 grid points and takes the code nearest to that: a step function of d, whose
    steps are found here by bisection over the bits of a float, once.
    """
    steps = torch.arange(1, 256)
    one = torch.tensor(1.0).view(torch.int32).item()
    low, high = torch.full((255,), -one), torch.full((255,), one)
    while bool((high - low > 1).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = _encode_on_grid(_float_of_rank(middle)) >= steps
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return _float_of_rank(low)


def _float_of_rank(rank: Tensor) -> Tensor:
    """Floats in ascending order, numbered: 0 is 0.0, 1 the next above."""
    bits = torch.where(rank < 0, -rank - 2**31, rank)
    return bits.to(torch.int32).view(torch.float32)


def _encode_on_grid(d: Tensor) -> Tensor:
    table = nested_code()
    midpoints = (table[:-1] + table[1:]) * 0.5
    grid = torch.arange(65536, dtype=torch.float32) * 2 / 65535 - 1
    nearest = torch.bucketize(grid, midpoints)
    return nearest[((d + 1) * 0.5 * 65535 + 0.5).long()]
