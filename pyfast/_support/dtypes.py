"""The dtypes that ops compute and accumulate in, and whether they record a graph."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
# Looked up once, because torch.compile does not trace the question before torch 2.12.
_AUTOCASTING = frozenset(filter(torch.amp.is_autocast_available, _DEVICES))


def has_autocast(device_type: str) -> bool:
    """Return whether torch has autocast for this type of device."""
    return device_type in _AUTOCASTING


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for this device."""
    return device.type in _AUTOCASTING and torch.is_autocast_enabled(device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return x's dtype, or autocast's where autocast is on, as torch's own linear ops choose it."""
    lowered = x.is_floating_point() and x.dtype != torch.float64 and autocasts(x.device)
    return torch.get_autocast_dtype(x.device.type) if lowered else x.dtype


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that sums over x are accumulated in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def needs_graph(*tensors: Tensor | None) -> bool:
    """Return whether an op must go through its autograd Function.

    That is so if any of the tensors needs a gradient. It is so in forward mode, too, which the
    Function refuses with an error.
    """
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
