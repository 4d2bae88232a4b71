"""The adapter's kernels, as its launchers launch them, compiled without a GPU.

test_lora_compile.py says what is checked.
"""

import pytest
import torch
from helpers import triton_build
from helpers.triton_build import NAMES, every_capability, has_atomics, has_tensor_cores

from pyfast.kernels import adapter

pytestmark = pytest.mark.needs("compiler")
# pytest finds fixtures in the module of a test.
checked = triton_build.checked


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def step(m, bottleneck, dtype, activation, weights=None):
    """Return a name, and a function that runs a forward and a backward with all gradients."""
    x, weights = empty(m, 4096, dtype=dtype), weights or dtype
    down, up = empty(bottleneck, 4096, dtype=weights), empty(4096, bottleneck, dtype=weights)
    down_bias, up_bias = empty(bottleneck, dtype=weights), empty(4096, dtype=weights)

    def run():
        adapter.adapter(x, down, down_bias, up, up_bias, x, activation, 0.5)
        adapter.adapter_backward(x, x, down, down_bias, up, True, activation, 0.5, [True] * 5)

    return f"{NAMES[dtype]}-M{m}-b{bottleneck}-{activation}-{NAMES[weights]}", run


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
STEPS = [
    step(1, 64, BF16, "relu"),
    step(32, 64, FP16, "silu"),
    step(512, 64, BF16, "tanh"),
    step(4096, 256, BF16, "gelu_tanh", weights=FP32),
    step(4096, 64, FP32, "gelu"),
]


def cases():
    """Yield (id, capability -> Build) of each kernel that no earlier step launches."""
    known = set()
    for name, run in STEPS if not triton_build.INTERPRETED else []:
        for i, build in enumerate(triton_build.launches(run, 90)):
            if build.kernel.startswith("adapter.") and build not in known:
                known.add(build)
                kernel = build.kernel.removeprefix("adapter.")
                yield f"{name}-{i}-{kernel}", lambda c, build=build: build._replace(capability=c)


@every_capability(list(cases()))
def test_adapter_kernels_use_tensor_cores_for_16_bits_and_no_atomics(build, checked):
    if "product" in build.kernel:
        # fp32 is fp32, not TF32.
        exact = dict(build.constants)["T"] is adapter.tl.float32
        assert has_tensor_cores(checked) != exact
    # Without atomics the order of the sums is fixed.
    assert not has_atomics(checked)
