r"""Locality-sensitive hashing: which tokens point the same way.

    bucket(x) = argmax over i of (x r_i, -x r_i)        for random directions r

Near vectors get near buckets. Each round has its own directions. Above 128 buckets, a bucket is a
pair (or more) of smaller ones, each with its own directions, so that the work grows as the square
root of the number of buckets. Only the ids are stored, and nothing is differentiable. A stable
counting sort then brings the tokens of a bucket together.

`pyfast/reference/_lsh_hash.py` is the specification.
"""

import math

import torch
from torch import Tensor

from pyfast._support import checks, seeds
from pyfast.ops.registered.lsh_hash import hash_tokens, make_rotations
from pyfast.reference import lsh_options

# --- checks ---


def check_n_buckets(n_buckets: object) -> None:
    """Raise unless n_buckets is an even number, or a tuple of even factors."""
    factors = (n_buckets,) if isinstance(n_buckets, int) else n_buckets
    if not isinstance(factors, tuple | list) or not factors:
        raise TypeError(
            f"n_buckets is {n_buckets!r}; it must be an even integer or a tuple of some"
        )
    for factor in factors:
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 2 or factor % 2:
            raise ValueError(
                f"n_buckets is {n_buckets!r}; it must be even and at least 2, as must its factors"
            )
    if math.prod(factors) > 2**30:
        raise ValueError(f"n_buckets is {n_buckets!r}; more than 2^30 are not supported")


def check_rounds(n_hashes: int | None, rotations: Tensor | None) -> None:
    """Raise unless there is at least one round, and the rotations have as many."""
    if n_hashes is not None and (
        not isinstance(n_hashes, int) or isinstance(n_hashes, bool) or n_hashes < 1
    ):
        raise ValueError(f"n_hashes is {n_hashes!r}; it must be an integer, 1 or more")
    if rotations is None:
        return
    checks.tensor("rotations", rotations, checks.FLOATS_AND_DOUBLE)
    shape = list(rotations.shape)
    if not 3 <= rotations.dim() <= 5:
        raise ValueError(
            f"rotations has shape {shape}; "
            "it must be [(batch,) (heads,) dim, n_hashes, buckets / 2]"
        )
    if n_hashes not in (None, rotations.shape[-2]) or rotations.shape[-2] == 0:
        raise ValueError(
            f"rotations has shape {shape}; its last but one must be n_hashes, {n_hashes or 1}"
        )


def check_hash_seed(seed: int | None) -> None:
    """Raise unless a module's seed is None or an integer of 64 bits."""
    is_integer = isinstance(seed, int) and not isinstance(seed, bool)
    if seed is not None and not (is_integer and -(2**63) <= seed < 2**64):
        raise ValueError(f"hash_seed is {seed!r}; it must be None or an integer of 64 bits")


def check_mask(mask: Tensor | None, qk: Tensor) -> None:
    """Raise unless the mask is None or [batch, length] of booleans."""
    if mask is not None:
        checks.tensor("key_padding_mask", mask, (torch.bool,))
        checks.shape("key_padding_mask", mask, (qk.shape[0], qk.shape[2]))
        checks.same_device("key_padding_mask", mask, "qk", qk.device)


# --- the function ---


@torch.no_grad()
def lsh_buckets(
    qk: Tensor,
    *,
    n_hashes: int | None = None,
    n_buckets: int | tuple[int, ...],
    seed: int | Tensor | None = None,
    rotations: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Hash tokens to buckets: near vectors get the same bucket with high probability.

    Args:
        qk: [batch, heads, length, dim], float32, bfloat16 or float16.
        n_hashes: Rounds, each with its own directions. Default: 4, or as many as `rotations` has.
        n_buckets: An even number, or its even factors. Above 128, a number is factored, to a little
            less if it must be.
        seed: The seed of the directions. Heads have different ones, examples share them. Default: a
            new seed from torch's generator.
        rotations: The directions themselves, [dim, n_hashes, sum(factors) / 2], with heads, or
            batch and heads, in front if they differ. Default: drawn from `seed`.
        key_padding_mask: [batch, length], True for tokens. The others get the id n_buckets, one
            more than there are. Default: all are tokens.

    Returns:
        Bucket ids, int32 [batch, heads, n_hashes, length].

    Example:
        >>> import torch, pyfast
        >>> buckets = pyfast.lsh_buckets(torch.randn(1, 4, 256, 32), n_hashes=2, n_buckets=8)
        >>> buckets.shape, bool((buckets < 8).all())
        (torch.Size([1, 4, 2, 256]), True)
    """
    checks.tensor("qk", qk, checks.FLOATS_AND_DOUBLE)
    if qk.dim() != 4 or qk.shape[-1] == 0:
        raise ValueError(f"qk has shape {list(qk.shape)}; it must be [batch, heads, length, dim]")
    check_n_buckets(n_buckets)
    check_rounds(n_hashes, rotations)
    rounds, factors = lsh_options.rounds_and_factors(n_hashes, n_buckets, rotations)
    check_mask(key_padding_mask, qk)
    rotations = rotations_for(qk, rounds, factors, seed, rotations)
    buckets = hash_tokens(qk.detach(), rotations, list(factors))
    if key_padding_mask is None:
        return buckets
    return torch.where(key_padding_mask[:, None, None], buckets, math.prod(factors))


def rotations_for(
    qk: Tensor, rounds: int, factors: tuple[int, ...], seed, rotations: Tensor | None
) -> Tensor:
    """Return the caller's rotations, checked, or new ones from the seed, with five dimensions."""
    tail = (qk.shape[-1], rounds, sum(factors) // 2)
    if rotations is None:
        return make_rotations(seeds.seed_tensor(qk, seed), (qk.shape[1], *tail))[None]
    checks.same_device("rotations", rotations, "qk", qk.device)
    leading = rotations.shape[:-3]
    fits = all(size in (1, full) for size, full in zip(leading[::-1], qk.shape[1::-1]))
    if tuple(rotations.shape[-3:]) != tail or not fits:
        reason = f"for {qk.shape[0]} x {qk.shape[1]} heads and buckets {list(factors)}"
        raise ValueError(
            f"rotations has shape {list(rotations.shape)}; "
            f"it must be [(batch,) (heads,) {str(list(tail))[1:]} {reason}"
        )
    message = "rotations holds NaN or infinite values; it must be finite"
    is_finite = rotations.isfinite().all()
    if rotations.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(is_finite, message)
    elif not is_finite:
        raise ValueError(message)
    return lsh_options.five_dims(rotations)


@torch.compiler.assume_constant_result
def transformers_rotations(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the rotations that transformers' Reformer draws for a config's hash_seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)
