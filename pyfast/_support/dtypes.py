"""The dtypes that ops compute in."""

import torch
from torch import Tensor

# Looked up once: torch.compile does not trace the question before torch 2.12.
_DEVICES = (
    "cpu",
    "cuda",
    "hpu",
    "mps",
    "mtia",
    "xla",
    "xpu",
    torch._C._get_privateuse1_backend_name(),
)


_AUTOCASTING = frozenset(filter(torch.amp.is_autocast_available, _DEVICES))


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there."""
    return device.type in _AUTOCASTING and torch.is_autocast_enabled(device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or autocast's where autocast is on, as for torch's own linear ops."""
    lowered = x.is_floating_point() and x.dtype != torch.float64 and autocasts(x.device)
    return torch.get_autocast_dtype(x.device.type) if lowered else x.dtype
