"""FlexAttention as LSH attention: sorting, mask and merging around its kernels."""

import functools
from typing import Any

import torch

from bench.lsh_attention.problem import CHUNK, normalize_keys
from bench.measure.peer import load_module


@functools.cache
def compile_attention() -> Any:
    """Return FlexAttention, compiled for fixed shapes."""
    return torch.compile(
        load_module("torch.nn.attention.flex_attention").flex_attention, dynamic=False
    )


@torch.compile
def sort_tokens(q, v, order):
    """Return queries, keys and values in the sorted order of all rounds."""
    index = order.flatten(2)[..., None].expand(-1, -1, -1, q.shape[-1])
    k = normalize_keys(q.float(), "rms").to(q.dtype)
    return q.gather(2, index), k.gather(2, index), v.gather(2, index)


@torch.compile
def merge_rounds(out, lse, v, order):
    """Sum the rounds' results by the share of each in the one softmax.

    Where no round has a key, the result is the token's own value.
    """
    rounds, n = order.shape[-2:]
    back = order.argsort(dim=-1) + n * torch.arange(rounds, device=order.device)[:, None]
    lse = lse.gather(2, back.flatten(2)).view(order.shape)
    out = out.gather(2, back.flatten(2)[..., None].expand_as(out)).view(*order.shape, -1)
    alone = lse.isinf().all(2, keepdim=True)
    share = lse.masked_fill(alone, 0).softmax(2).to(out.dtype)
    return torch.where(alone[:, :, 0, :, None], v, (out * share[..., None]).sum(2))


def make_mask(position: torch.Tensor, block: int) -> Any:
    """Return the mask: a chunk sees the earlier tokens of itself and of the chunk before.

    For the first chunk, the chunk before is the last one.
    """
    length = position.shape[-1]
    blocks, chunks = length // block, length // CHUNK

    def visible(b, h, q, k):
        back = q // CHUNK - k // CHUNK
        return ((back == 0) | (back == 1) | (back == 1 - chunks)) & (
            position[b, h, k] < position[b, h, q]
        )

    rows = torch.arange(blocks, dtype=torch.int32, device=position.device)
    count = torch.full_like(rows, min(2, blocks))[None, None]
    keys, queries = (torch.stack([rows, rows.roll(shift)], dim=-1)[None, None] for shift in (1, -1))
    return load_module("torch.nn.attention.flex_attention").BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=count,
        kv_indices=keys,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=count,
        q_indices=queries,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(block, block),
        mask_mod=visible,
    )
