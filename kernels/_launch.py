"""Host helpers of the kernel launchers.

The integer helpers are plain Python, because `triton.cdiv` and its like cost more host time than a
short kernel runs. Launchers are pure functions of their arguments: they read no environment, wait
for no device, decide nothing by a tensor's values and keep nothing between two calls. They see a
device through `capability` alone, and an address only in `nf4_linear.find_formats`.
"""

import functools

import torch

# Launch option of the kernels that may fuse a product and a sum into an FMA. It is explicit,
# because Triton 3.10 changes the default.
FUSED = dict(enable_fp_fusion=True)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is not below n; n must be 1 or more."""
    return 1 << (n - 1).bit_length()


def capability(x: torch.Tensor) -> tuple[int, int]:
    """Return the compute capability of x's device; (8, 0) in the interpreter, where any will do."""
    return _capability(x.device) if x.is_cuda else (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
