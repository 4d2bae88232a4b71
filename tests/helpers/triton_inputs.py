"""Random inputs of kernel tests, and the device on which the kernels run."""

import math

import pytest
import torch

from pyfast.formats import nf4_codebooks

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter multiplies bf16 wrongly and truncates where a GPU rounds to it.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
# Marks a test that runs kernels, on a GPU or in the interpreter.
native = pytest.mark.needs("kernels")


def random_state(shape, blocksize, nested, seed=0):
    """Return the state of a 4-bit weight with any bytes and any scales; no encoder is involved.

    The offset and the codes have the same magnitude, so that wrong roundings show.
    """
    numel = math.prod(shape)
    g = torch.Generator().manual_seed(seed + numel)
    blocks = -(-numel // blocksize)
    packed = torch.randint(256, ((numel + 1) // 2, 1), generator=g, dtype=torch.uint8)
    state = [packed, torch.rand(blocks, generator=g) + 0.01, nf4_codebooks.CODE["nf4"]]
    if nested:
        state[1] = torch.randint(256, (blocks,), generator=g, dtype=torch.uint8)
        state += [
            torch.rand(-(-blocks // 256), generator=g),
            torch.rand(256, generator=g) * 2 - 1,
            torch.rand(1, generator=g),
        ]
    return [t.to(DEVICE) for t in state]


def random(*shape, dtype=torch.float32, seed=1):
    """Return normal numbers on DEVICE, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
