"""transformers' attention implementation "pyfast_lsh":
`model.set_attn_implementation("pyfast_lsh")`.

Queries see the keys that hash near them, by softmax over scaling * q k as in the model's own
attention: with everything in one chunk, or with enough rounds, it is that attention. Keys are not
normalized, one seen in several rounds counts once, and grouped heads are shared, not repeated. A
padding mask costs nothing.

The exact attention (torch's) runs instead where hashing has nothing to save or another mask is
wanted: tokens that go on from a KV cache attend to all of it; sliding windows, packed sequences,
4-dimensional masks and a position bias stay what they are.

`model.config.pyfast_lsh = {"n_hashes": 8, "chunk_length": 64}` sets what is not to be as by
default; it is saved with the model. In training rotations are drawn from torch's generator, in eval
they are always the same ("seed").
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from pyfast._support import checks
from pyfast.ops.lsh_attention import lsh_attention

NAME = "pyfast_lsh"
DEFAULTS = {"n_hashes": 4, "chunk_length": 64, "key_norm": "none", "correct_duplicates": True}
OPTIONS = (*DEFAULTS, "n_buckets", "preset", "same_bucket", "wrap", "seed")
_OTHER_MATHS = ("softcap", "s_aux")  # of some models' attention


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """[batch, length, heads, dim]; query, key and value are [batch, heads, length, dim]."""
    for name in _OTHER_MATHS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is set; attention {NAME!r} has none, and this model must use another"
            )
    n, plain = query.shape[2], attention_mask is None or attention_mask.dim() == 2
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = n == key.shape[2] or (
        causal and 1 < n < key.shape[2]
    )  # a static cache has room after the prompt
    if not plain or not whole or kwargs.get("position_bias") is not None:
        mask = (
            attention_mask[:, None, None]
            if attention_mask is not None and plain
            else attention_mask
        )
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, mask, **options, **kwargs)
    out = lsh_attention(
        query,
        value[:, :, :n],
        k=key[:, :, :n],
        causal=causal,
        scale=scaling,
        key_padding_mask=attention_mask,
        dropout_p=dropout,
        **_options(module),
    )
    return out.transpose(1, 2).contiguous(), None


def _options(module: nn.Module) -> dict:
    given = getattr(getattr(module, "config", None), NAME, None) or {}
    if not isinstance(given, dict):
        raise TypeError(f"config.{NAME} must be a dict, not {type(given).__name__}")
    for name in given:
        checks.one_of(f"a key of config.{NAME}", name, OPTIONS)
    return DEFAULTS | ({} if module.training else {"seed": 0}) | given


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **options,
) -> Tensor | None:
    """What `attend` takes: for a whole sequence which tokens are padding, or None if none is; else the exact mask."""
    plain = mask_function is bidirectional_mask_function and q_length == kv_length
    plain |= mask_function is causal_mask_function and 1 < q_length <= kv_length
    if plain and kv_offset == 0 and _is_zero(q_offset):
        return None if attention_mask is None else attention_mask[:, :q_length].bool()
    if q_length > 1:  # or `attend` could not tell it from a whole sequence's
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        **options,
    )


def _is_zero(offset: int | Tensor) -> bool:
    if isinstance(offset, Tensor):
        return not torch.compiler.is_compiling() and int(offset) == 0
    return offset == 0


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
