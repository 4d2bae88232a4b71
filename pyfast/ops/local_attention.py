"""?"""

import torch
from torch import Tensor

from pyfast.ops.lsh_attention import attend, check_inputs, check_options
from pyfast.reference import lsh_options

_CHOICES = lsh_options.LSHChoices(scale=None, key_norm="none", wrap="none", attend_self=True)


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
    """Causal attention to the own chunk and the one before. Differentiable in q, k and v.

    Args:
        q: [batch, heads, length, dim], dim up to 256, float32, bfloat16 or float16 (and float64);
        autocast applies. k: the same, or with a divisor of the heads, each then shared by a group
        of them. v: [batch, k's heads, length, v_dim]. chunk_length: 16 to 256, a multiple of 16.
        key_padding_mask: [batch, length], True: a token to be seen. dropout_p: of the attention's
        weights. seed: of the dropout; by default a new one from torch's generator.
    """
    check_inputs(q, k, v, key_padding_mask, names=("q", "k", "v"))
    check_options(chunk_length, True, "dropout_p", dropout_p)
    positions = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    order = positions.expand(2, *q.shape[:2], 1, -1)
    return attend(
        q, k, v, order, None, None, key_padding_mask, seed, dropout_p, chunk_length, True, _CHOICES
    )[0]
