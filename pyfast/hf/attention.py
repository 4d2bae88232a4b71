"""The attention implementation "pyfast_lsh" of transformers.

`model.set_attn_implementation("pyfast_lsh")` switches it on. Queries see the keys that hash near
them. The softmax is over `scaling * q @ k.t()`, as in the model's own attention: with the whole
sequence in one chunk, or with enough rounds, the two are equal. Keys are not normalized, a key seen
in several rounds counts once, and grouped heads are shared, not repeated. A padding mask costs
nothing.

torch's exact attention runs where hashing saves nothing: tokens that follow a KV cache attend to
all of it. It also runs for every other mask: sliding windows, packed sequences, 4-dimensional masks
and a position bias have their usual meaning.

`model.config.pyfast_lsh = {"n_hashes": 8, "chunk_length": 64}` changes the options from DEFAULTS;
it is saved with the model. In training, rotations are drawn from torch's generator. In eval they
are always the same, drawn with seed 0; the option "seed" sets another.
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
_UNSUPPORTED = ("softcap", "s_aux")  # arguments of some models that change the softmax


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
    """Return the attention's output, [batch, length, heads, dim], and None for its weights.

    Query, key and value are [batch, heads, length, dim].
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is set; attention {NAME!r} has none, and this model must use another"
            )
    n, is_padding_mask = query.shape[2], attention_mask is None or attention_mask.dim() == 2
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A static cache has room after the prompt.
    is_whole_sequence = n == key.shape[2] or (causal and 1 < n < key.shape[2])
    needs_exact = not is_padding_mask or kwargs.get("position_bias") is not None
    if needs_exact or not is_whole_sequence:
        mask = attention_mask
        if mask is not None and is_padding_mask:
            mask = mask[:, None, None]
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, mask, **options, **kwargs)
    output = lsh_attention(
        query,
        value[:, :, :n],
        k=key[:, :, :n],
        causal=causal,
        scale=scaling,
        key_padding_mask=attention_mask,
        dropout_p=dropout,
        **_options(module),
    )
    return output.transpose(1, 2).contiguous(), None


def _options(module: nn.Module) -> dict:
    """Return the options of `lsh_attention`: defaults, then those of the model's configuration."""
    options = getattr(getattr(module, "config", None), NAME, None) or {}
    if not isinstance(options, dict):
        raise TypeError(f"config.{NAME} must be a dict, not {type(options).__name__}")
    for name in options:
        checks.one_of(f"a key of config.{NAME}", name, OPTIONS)
    return DEFAULTS | ({} if module.training else {"seed": 0}) | options


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **options,
) -> Tensor | None:
    """Return the mask that `attend` takes.

    For a whole sequence it is the padding mask, [batch, length], or None without padding. In all
    other cases it is the exact mask, with 4 dimensions.
    """
    is_whole_sequence = mask_function is bidirectional_mask_function and q_length == kv_length
    is_whole_sequence |= mask_function is causal_mask_function and 1 < q_length <= kv_length
    if is_whole_sequence and kv_offset == 0 and _is_zero(q_offset):
        return None if attention_mask is None else attention_mask[:, :q_length].bool()
    if q_length > 1:
        # Without a mask `attend` would take the tokens for a whole sequence.
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
AttentionMaskInterface.register(NAME, make_mask)
