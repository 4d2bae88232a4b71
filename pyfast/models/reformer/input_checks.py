"""Checks of the tokens that a Reformer is called with."""

import torch
from torch import nn

from pyfast._support import checks
from pyfast.models.reformer.cache import ReformerCache
from pyfast.ops import lsh_hash


def check_inputs(
    model: nn.Module,
    ids: object,
    labels: object,
    mask: object,
    n_hashes: object,
    cache: object,
) -> None:
    """Check the arguments of `Reformer.forward`."""
    _check_ids(model, ids)
    if labels is not None:
        checks.tensor("labels", labels, (torch.int64,))
        checks.shape("labels", labels, ids.shape)
    if mask is not None:
        checks.tensor("key_padding_mask", mask, (torch.bool,))
        checks.shape("key_padding_mask", mask, ids.shape)
        checks.same_device("key_padding_mask", mask, "ids", ids.device)
    lsh_hash.check_rounds(n_hashes, None)
    if cache is not None:
        checks.instance("cache", cache, ReformerCache)
        cache.check(model)
        if labels is not None or model.training:
            raise ValueError(
                "cache is given with labels, or in training; it is for inference: call eval()"
            )
    check_length(model, ids.shape[1] + (0 if cache is None else cache.length))


def _check_ids(model: nn.Module, ids: object) -> None:
    checks.tensor("ids", ids, (torch.int64,))
    if ids.dim() != 2:
        raise ValueError(f"ids has shape {list(ids.shape)}; it must be [batch, length]")
    checks.same_device("ids", ids, "the model", model.tokens.weight.device)
    if ids.device.type == "cpu" and ids.numel():
        low, high = map(int, ids.aminmax())
        vocab_size = model.config.vocab_size
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"ids holds numbers from {low} to {high}; they must be 0 to {vocab_size - 1}"
            )


def check_length(model: nn.Module, length: int) -> None:
    """Check that the model has positions for so many tokens."""
    limit = model.config.max_length
    if model.positions is not None and length > limit:
        raise ValueError(
            f"ids has {length} tokens, with those before; there must be at most max_length, {limit}"
        )
