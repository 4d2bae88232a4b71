"""Hashing and sorting as registered ops: checks, fakes, launchers."""

import importlib
import math

import torch

from pyfast import reference
from pyfast._support import registry


def _check_hash(x, rotations, factors) -> None:
    wanted = (x.shape[-1], rotations.shape[-2], sum(factors) // 2)
    if x.dim() != 4 or rotations.dim() != 5 or tuple(rotations.shape[2:]) != wanted or not factors:
        shapes = [list(x.shape), list(rotations.shape)]
        raise ValueError(
            f"x, rotations: {shapes}; they must be [b, h, n, d], [b, h, d, r, {sum(factors)} / 2]"
        )
    if any(size not in (1, full) for size, full in zip(rotations.shape, x.shape[:2])):
        raise ValueError(
            f"rotations has shape {list(rotations.shape)}; its first two must be 1 or x's {x.shape[:2]}"
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
            f"buckets is {buckets.dtype} {list(buckets.shape)} of {n_buckets}; it must be int32 [.., n]"
        )


def _rotations_fake(seed, shape):
    return seed.new_empty(shape, dtype=torch.float32)


def _hash_fake(x, rotations, factors):
    _check_hash(x, rotations, factors)
    return x.new_empty(*x.shape[:2], rotations.shape[-2], x.shape[2], dtype=torch.int32)


def _sort_fake(buckets, n_buckets):
    _check_sort(buckets, n_buckets)
    return buckets.new_empty(buckets.shape), buckets.new_empty(buckets.shape)


def _kernels():
    return importlib.import_module("pyfast.kernels.lsh_hash")


def _rotations_cuda(seed, shape):
    return _kernels().rotations(seed, shape)


def _hash_cuda(x, rotations, factors):
    _check_hash(x, rotations, factors)
    return _kernels().hash_tokens(
        x.contiguous(), rotations.expand(*x.shape[:2], -1, -1, -1), factors
    )


def _sort_cuda(buckets, n_buckets):
    _check_sort(buckets, n_buckets)
    in_range = ((buckets >= 0) & (buckets < n_buckets)).all()
    torch._assert_async(
        in_range, f"buckets holds ids beyond 0 to {n_buckets - 1}"
    )  # without waiting for the GPU
    return _kernels().sort(buckets.contiguous(), n_buckets)


make_rotations = registry.register(
    "lsh_rotations",
    fake=_rotations_fake,
    cuda=_rotations_cuda,
    reference=reference.lsh_rotations_op,
)


hash_tokens = registry.register(
    "lsh_hash",
    fake=_hash_fake,
    cuda=_hash_cuda,
    reference=reference.lsh_hash_op,
    double=reference.lsh_hash_op,  # for gradcheck; no kernel computes in it
)


sort = registry.register(
    "lsh_sort", fake=_sort_fake, cuda=_sort_cuda, reference=reference.lsh_sort_op
)
