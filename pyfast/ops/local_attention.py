"""Attention of each token to its own chunk and the one before, by LSH attention's kernels."""

import torch
from torch import Tensor

from pyfast.ops.lsh_attention import attend, check_inputs, check_options
from pyfast.reference import lsh_options

_OPTIONS = lsh_options.LSHChoices(scale=None, key_norm="none", wrap="none", attend_self=True)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_length: int = 64,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Attend causally to the query's own chunk and the one before. Differentiable in q, k and v.

    Args:
        q: [batch, heads, length, dim], dim up to 256, float32, bfloat16 or float16 (and float64).
            Autocast applies.
        k: [batch, key_heads, length, dim]. key_heads is heads or a divisor of it; each key head
            then serves a group of query heads.
        v: [batch, key_heads, length, v_dim].
        chunk_length: 16 to 256, a multiple of 16.
        key_padding_mask: [batch, length], True for tokens that are seen. Default: all are.
        dropout_p: The probability that a weight of the attention is dropped.
        seed: The seed of the dropout. Default: a new one from torch's generator.

    Returns:
        [batch, heads, length, v_dim] in the inputs' dtype.

    Example:
        >>> import torch, pyfast
        >>> q, k, v = (torch.randn(1, 4, 100, 32) for _ in range(3))
        >>> pyfast.local_attention(q, k, v, chunk_length=32).shape
        torch.Size([1, 4, 100, 32])
    """
    check_inputs(q, k, v, key_padding_mask, names=("q", "k", "v"))
    check_options(chunk_length, True, "dropout_p", dropout_p)
    positions = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    order = positions.expand(2, *q.shape[:2], 1, -1)  # sorted already
    return attend(
        q, k, v, order, None, None, key_padding_mask, seed, dropout_p, chunk_length, True, _OPTIONS
    )[0]
