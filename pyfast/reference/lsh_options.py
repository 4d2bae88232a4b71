"""Choices in which implementations of Reformer attention differ, and presets of implementations.

- `scale`: the factor of the scores; None is dim ** -0.5.
- `key_norm`: how keys are made unit length: "rms" (1e-6 is added to the mean square), "l2" or
  "none".
- `same_bucket`: whether a query sees only keys of its own bucket, or all of its two chunks.
- `correct_duplicates`: whether a key that is seen in n rounds counts once instead of n times.
- `wrap`: what the first chunk of a round looks back on. "rounds": the last chunk of the round
  before, and for the first round of the last one. "round": the last chunk of its own round.
  "none": nothing.
- `pad_bucket`: whether masked tokens get a bucket of their own, the last, instead of the one that
  they hash to.
- `mask_queries`: whether a masked query sees nothing, instead of what others see.
- `attend_self`: whether a query sees its own key like any other, or only if it sees no other.
"""

import math
from dataclasses import dataclass, fields, replace

from pyfast._support import checks

KEY_NORMS = ("rms", "l2", "none")
WRAPS = ("rounds", "round", "none")
UNFACTORED = 128  # buckets; more are found as pairs of smaller numbers


@dataclass(frozen=True)
class LSHChoices:
    """The choices that the module's docstring describes."""

    bucket_rule: str = "trax"
    scale: float | None = 1.0
    key_norm: str = "rms"
    same_bucket: bool = False
    correct_duplicates: bool = False
    wrap: str = "rounds"
    pad_bucket: bool = True
    mask_queries: bool = False
    attend_self: bool = False


PRESETS = {
    "trax": LSHChoices(),
    "hf": LSHChoices(bucket_rule="hf"),
    "lucidrains": LSHChoices(
        bucket_rule="lucidrains", scale=None, key_norm="l2", pad_bucket=False, mask_queries=True
    ),
    "paper": LSHChoices(key_norm="l2", same_bucket=True, correct_duplicates=True, wrap="none"),
}


def resolve(preset: str, separate_keys: bool, **choices) -> LSHChoices:
    """Return the preset's choices, replaced by those that are not None.

    With separate keys, a query sees its own key by default.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be {', '.join(map(repr, PRESETS))}")
    requested = {"attend_self": separate_keys} | {
        name: value for name, value in choices.items() if value is not None
    }
    resolved = replace(PRESETS[preset], **requested)
    for name, allowed in (("key_norm", KEY_NORMS), ("wrap", WRAPS)):
        if getattr(resolved, name) not in allowed:
            raise ValueError(
                f"{name} is {getattr(resolved, name)!r}; it must be {', '.join(map(repr, allowed))}"
            )
    for field in fields(resolved):
        if field.type is bool and not isinstance(getattr(resolved, field.name), bool):
            raise TypeError(
                f"{field.name} is {getattr(resolved, field.name)!r}; it must be True or False"
            )
    if resolved.scale is not None:
        checks.finite_number("scale", resolved.scale)
    return resolved


def default_buckets(rule: str, length: int, chunk_length: int) -> tuple[int, ...]:
    """Return how many buckets this many tokens are hashed to, as factors.

    The paper and trax: 2 length / chunk_length; transformers: a power of 2 not above;
    reformer-pytorch: half.
    """
    chunks = max(1, length // chunk_length)
    if rule == "lucidrains":
        return (max(2, chunks // 2 * 2),)
    if rule == "hf":
        power = (2 * chunks).bit_length() - 1
        if 2**power > 2 * max(math.isqrt(chunks), chunk_length):
            return (2 ** (power // 2), 2 ** (power - power // 2))
        return (2**power,)
    return factored(2 * chunks)


def factored(n_buckets: int) -> tuple[int, ...]:
    """Return the number itself, or above UNFACTORED two even factors.

    Their product may be a little less. Hashing then costs their sum.
    """
    if n_buckets <= UNFACTORED:
        return (n_buckets,)
    first = 2 ** math.ceil(math.log2(math.sqrt(n_buckets)))
    return (first, max(2, 2 * (n_buckets // (2 * first))))


def rounds_and_factors(n_hashes: int | None, n_buckets, rotations) -> tuple[int, tuple[int, ...]]:
    """Return the rounds, by default 4 or the rotations', and the factors of n_buckets."""
    rounds = n_hashes if n_hashes is not None else 4 if rotations is None else rotations.shape[-2]
    return rounds, factors(n_buckets, "trax", 0, 1, rotations)


def factors(
    n_buckets, rule: str, length: int, chunk_length: int, rotations=None
) -> tuple[int, ...]:
    """Return the factors of n_buckets, a number or its factors; None: by the rule.

    Rotations for all buckets at once keep a number unfactored.
    """
    if n_buckets is None:
        result = default_buckets(rule, length, chunk_length)
    elif isinstance(n_buckets, int):
        result = (n_buckets,) if rule in ("hf", "lucidrains") else factored(n_buckets)
    else:
        result = tuple(n_buckets)
    total = math.prod(result) if n_buckets is None else n_buckets
    unfactored = (
        isinstance(total, int) and rotations is not None and 2 * rotations.shape[-1] == total
    )
    return (total,) if unfactored else result


def five_dims(rotations):
    """Return rotations as [batch, heads, dim, rounds, width]; they may lack the first two."""
    return rotations[(None,) * (5 - rotations.dim())]
