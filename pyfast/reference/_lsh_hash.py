"""Locality-sensitive hashing: random rotations, bucket ids, and the tokens sorted by them."""

import math

import torch
from torch import Tensor

from pyfast._support.dtypes import sum_dtype
from pyfast.reference import lsh_options
from pyfast.reference._common import philox


def lsh_buckets(
    qk, *, n_hashes=None, n_buckets, seed=None, rotations=None, key_padding_mask=None
) -> Tensor:
    """Return bucket ids, [batch, heads, n_hashes, length].

    An id says which of the round's rotations and their opposites is nearest.
    """
    rounds, factors = lsh_options.rounds_and_factors(n_hashes, n_buckets, rotations)
    if rotations is None:
        shape = (qk.shape[1], qk.shape[-1], rounds, sum(factors) // 2)
        rotations = lsh_rotations_op(torch.as_tensor(seed), shape).to(qk.device)
    buckets = lsh_hash_op(qk, lsh_options.five_dims(rotations), factors)
    if key_padding_mask is None:
        return buckets
    return torch.where(key_padding_mask[:, None, None], buckets, math.prod(factors))


def lsh_rotations_op(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return normal numbers of this shape, by Box and Muller.

    Four come from the words of philox(seed, row 2^62, counter i / 4).
    """
    count = math.prod(shape)
    group = torch.arange(-(-count // 4), device=seed.device)
    words = philox(int(seed), 2**62 + (group >> 32), group).view(-1, 2, 2).double()
    radius = (-2 * (((words[..., 0] / 256).floor() + 0.5) / 2**24).log()).sqrt()
    angle = 2 * math.pi * words[..., 1] / 2**32
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normal.flatten()[:count].view(shape).float()


def lsh_hash_op(x: Tensor, rotations: Tensor, factors: list[int]) -> Tensor:
    """Return bucket ids [b, h, rounds, n] of x [b, h, n, d].

    rotations is [b, h, d, rounds, sum(factors) / 2].
    """
    dtype = sum_dtype(x)
    rotated = torch.einsum(
        "bhnd,bhdrw->bhrnw", x.to(dtype), rotations.to(dtype).expand(*x.shape[:2], -1, -1, -1)
    )
    buckets, product = 0, 1
    for factor, part in zip(factors, rotated.split([f // 2 for f in factors], dim=-1)):
        buckets = buckets + product * torch.cat([part, -part], dim=-1).argmax(dim=-1)
        product *= factor
    return buckets.int()


def lsh_sort_op(buckets: Tensor, n_buckets: int) -> tuple[Tensor, Tensor]:
    """Return the positions sorted by (bucket, position), and each position's rank among them."""
    if buckets.numel() and not (int(buckets.min()) >= 0 and int(buckets.max()) < n_buckets):
        raise ValueError(
            f"buckets holds {int(buckets.min())} .. {int(buckets.max())}; "
            f"ids must be 0 .. {n_buckets - 1}"
        )
    order = buckets.argsort(dim=-1, stable=True)
    return order.int(), inverse(order).int()


def inverse(order: Tensor) -> Tensor:
    """Return the inverse of each permutation."""
    ranks = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter(-1, order, ranks)
