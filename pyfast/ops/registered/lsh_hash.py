"""Hashing and sorting as registered ops: checks, fakes, launches.

CPU kernels are in csrc/cpu/lsh/hash.cpp, GPU kernels in kernels/lsh_hash.py.
"""

import math

import torch

from pyfast import reference
from pyfast._support import registry

# --- checks: what memory safety rests on, where C++ does not check it ---


def _check_hash(x, rotations, factors) -> None:
    sizes = (x.shape[-1], rotations.shape[-2], sum(factors) // 2)
    if x.dim() != 4 or rotations.dim() != 5 or tuple(rotations.shape[2:]) != sizes or not factors:
        shapes = [list(x.shape), list(rotations.shape)]
        raise ValueError(
            f"x, rotations: {shapes}; they must be [b, h, n, d], [b, h, d, r, {sum(factors)} / 2]"
        )
    if any(size not in (1, full) for size, full in zip(rotations.shape, x.shape[:2])):
        raise ValueError(
            f"rotations has shape {list(rotations.shape)}; "
            f"its first two must be 1 or x's {x.shape[:2]}"
        )
    if min(factors) < 2 or any(factor % 2 for factor in factors) or math.prod(factors) >= 2**31:
        raise ValueError(f"factors is {factors}; each must be even, their product below 2^31")
    if x.device != rotations.device:
        raise ValueError(
            f"rotations is on {rotations.device} but x is on {x.device}; they must be on one device"
        )


def _check_sort(buckets, n_buckets) -> None:
    if (
        buckets.dtype != torch.int32
        or buckets.dim() == 0
        or buckets.shape[-1] >= 2**31
        or not 0 < n_buckets < 2**31
    ):
        raise ValueError(
            f"buckets is {buckets.dtype} {list(buckets.shape)} of {n_buckets}; "
            "it must be int32 [.., n]"
        )


# --- fakes ---


def _rotations_fake(seed, shape):
    return seed.new_empty(shape, dtype=torch.float32)


def _hash_fake(x, rotations, factors):
    return x.new_empty(*x.shape[:2], rotations.shape[-2], x.shape[2], dtype=torch.int32)


def _sort_fake(buckets, n_buckets):
    return buckets.new_empty(buckets.shape), buckets.new_empty(buckets.shape)


# --- launches ---


def _launch_hash(launcher, x, rotations, factors):
    return launcher(x.contiguous(), rotations.expand(*x.shape[:2], -1, -1, -1), factors)


def _launch_sort(launcher, buckets, n_buckets):
    in_range = ((buckets >= 0) & (buckets < n_buckets)).all()
    # Asserted on the GPU, because the host does not wait for it.
    torch._assert_async(in_range, f"buckets holds ids beyond 0 to {n_buckets - 1}")
    return launcher(buckets.contiguous(), n_buckets)


# --- registration ---

make_rotations = registry.register(
    "lsh_rotations",
    fake=_rotations_fake,
    kernel="lsh_hash:rotations",
    reference=reference.lsh_rotations_op,
)

hash_tokens = registry.register(
    "lsh_hash",
    check=_check_hash,
    fake=_hash_fake,
    kernel="lsh_hash:hash_tokens",
    launch=_launch_hash,
    reference=reference.lsh_hash_op,
)

sort = registry.register(
    "lsh_sort",
    check=_check_sort,
    fake=_sort_fake,
    kernel="lsh_hash:sort",
    launch=_launch_sort,
    reference=reference.lsh_sort_op,
)
