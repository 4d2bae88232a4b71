"""Seeds of dropout and hashing, as tensors."""

import torch
from torch import Tensor

from pyfast._support import checks


def seed_tensor(x: Tensor, seed: int | Tensor | None) -> Tensor:
    """Return the seed as a scalar int64 tensor on x's device; None: a new one from torch."""
    if seed is None:
        return torch.randint(2**63 - 1, (), device=x.device)
    checks.seed(seed)
    if isinstance(seed, Tensor):
        if seed.numel() != 1:
            raise ValueError(f"seed has shape {list(seed.shape)}; it must be one number")
        return seed.reshape(()).to(x.device)
    # All 64 bits fit an int64. The device fills it in, because a CUDA graph takes no copy from the
    # host.
    return torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=x.device)
