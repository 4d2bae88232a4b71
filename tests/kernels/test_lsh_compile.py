"""LSH's kernels, as their launchers configure them, compiled without a GPU.

test_lora_compile.py says what is checked.
"""

import pytest
import torch
from helpers import triton_build
from helpers.triton_build import NAMES, Build, every_capability, has_atomics, has_tensor_cores

from pyfast.kernels import lsh_attention as forward
from pyfast.kernels import lsh_attention_backward as backward
from pyfast.kernels import lsh_hash as hashing

pytestmark = pytest.mark.needs("compiler")
# pytest finds fixtures in the module of a test.
checked = triton_build.checked
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(
    dtype,
    c,
    d,
    p=0.0,
    duplicates=False,
    same_bucket=False,
    masked=False,
    own_keys=False,
    tokens=False,
):
    """Return a name, and a function that runs a forward and a backward, by heads or by tokens."""
    q = empty(2, 16, 4096, d, dtype=dtype)
    if tokens:
        q = empty(2, 4096, 16, d, dtype=dtype).transpose(1, 2)
    numbers = empty(1 + own_keys, 2, 16, 4, 4096, dtype=torch.int32)
    k, lse = q if own_keys else None, empty(2, 16, 4096)
    buckets, ranks = numbers if same_bucket else None, numbers if duplicates else None
    mask = empty(2, 4096, dtype=torch.bool) if masked else None
    seed = empty(dtype=torch.int64) if p else None
    args = (
        q,
        k,
        q,
        numbers,
        buckets,
        ranks,
        mask,
        seed,
        p,
        c,
        1.0,
        "rms",
        "rounds",
        True,
        False,
        masked,
    )

    def run():
        forward.lsh_attention(*args)
        backward.lsh_attention_backward(q, lse, q, k, q, q, lse, *args[3:], [True, own_keys, True])

    flags = dict(
        dropout=p > 0,
        duplicates=duplicates,
        buckets=same_bucket,
        mask=masked,
        keys=own_keys,
        tokens=tokens,
    )
    name = f"{NAMES[dtype]}-c{c}-d{d}" + "".join(f"-{name}" for name, on in flags.items() if on)
    return name, run


def hashes(dtype):
    x = empty(2, 16, 4096, 64, dtype=dtype)
    rotations = empty(1, 16, 64, 4, 64).expand(2, -1, -1, -1, -1)
    return f"hash-{NAMES[dtype]}", lambda: hashing.hash_tokens(x, rotations, [128])


def sort():
    return "sort", lambda: hashing.sort(empty(2, 16, 4, 4096, dtype=torch.int32), 2**16)


RUNS = [
    attention(BF16, 64, 64, tokens=True),
    attention(FP16, 128, 128),
    attention(BF16, 64, 128, p=0.1),
    attention(BF16, 16, 64, p=0.1, masked=True),
    attention(
        BF16, 64, 128, duplicates=True, same_bucket=True, masked=True, own_keys=True, tokens=True
    ),
    attention(BF16, 64, 256),
    attention(FP32, 64, 64, p=0.1, duplicates=True, same_bucket=True, masked=True, own_keys=True),
    hashes(BF16),
    hashes(FP32),
    sort(),
]


def kernels(run, capability) -> dict[str, Build]:
    """Return the kernels that run() launches, by name; of several rounds the last one's."""
    builds = {}
    for build in triton_build.launches(run, capability):
        constants = dict(build.constants)
        name = build.kernel.split(".")[1].removesuffix("_kernel")
        for rows in ("dk_rows", "dv_rows"):
            if rows in constants and constants[rows] is None:
                name += rows
        builds[name] = build
    return builds


def cases():
    """Yield (id, capability -> Build) of each kernel of all runs."""
    for name, run in RUNS if not triton_build.INTERPRETED else []:
        for kernel in kernels(run, 90):
            yield (
                f"{name}-{kernel}",
                lambda capability, run=run, kernel=kernel: kernels(run, capability)[kernel],
            )


@every_capability(list(cases()))
def test_lsh_kernels_use_tensor_cores_for_16_bits_and_no_atomics(build, checked):
    kernel, tuples = build.kernel, dict(build.tuples)
    if "lsh_attention" in kernel and "delta" not in kernel:
        # fp32 is fp32, not TF32.
        tensor_cores = has_tensor_cores(checked)
        assert tensor_cores != (tuples["q_rows"][0] == "*fp32")
    if "count" not in kernel:
        # Without atomics the order of the sums is fixed.
        assert not has_atomics(checked)
