"""What launchers compute on the host: plainly, since a short kernel takes less time than Triton's own helpers do."""

import functools

import torch


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, which is 1 or more."""
    return 1 << (n - 1).bit_length()


def capability(x: torch.Tensor) -> tuple[int, int]:
    """Of x's device; the interpreter's is any."""
    return _capability(x.device) if x.is_cuda else (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
