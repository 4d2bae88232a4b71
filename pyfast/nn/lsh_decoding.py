"""LSH attention of the newest tokens alone.

New tokens sort in among the earlier ones and so move the borders of their chunks. A step gives its
tokens what a forward over all tokens so far would, not one over the final sequence. The results of
earlier tokens stay as they were.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyfast._support import dtypes
from pyfast.reference.lsh_options import LSHChoices

_MAX_GATHERED = 2**24  # numbers at a time, of the keys and values that some rows see


@dataclass(frozen=True)
class SortedTokens:
    """All n tokens that rows attend to, as `reference.lsh_attention_op` takes them."""

    keys: Tensor  # [batch, heads that divide the queries', n, dim]
    values: Tensor  # [batch, heads that divide the queries', n, v_dim]
    order: Tensor  # [1 or 2, batch, heads, rounds, n]
    ranks: Tensor  # like order
    buckets: Tensor  # like order
    mask: Tensor | None  # [batch, n]


def attend_rows(
    rows: Tensor,
    q: Tensor,
    tokens: SortedTokens,
    chunk_length: int,
    scale: float,
    choices: LSHChoices,
) -> Tensor:
    """Compute causal LSH attention of a few tokens.

    Args:
        rows: [m], int64; the positions of the queries.
        q: [batch, heads, m, dim]; the queries.
        tokens: all tokens, the rows among them.
        chunk_length: int; the tokens in a chunk.
        scale: float; multiplies the scores.
        choices: the options of the attention.

    Returns:
        [batch, heads, m, v_dim], in the dtype of q.
    """
    rounds, k, v = tokens.order.shape[3], tokens.keys, tokens.values
    n_gathered = 2 * chunk_length * rounds * (k.shape[-1] + v.shape[-1])  # of a query
    n_rows = max(1, _MAX_GATHERED // max(1, q.shape[0] * q.shape[1] * n_gathered))
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for some_rows, queries in zip(rows.split(n_rows), q.split(n_rows, dim=2)):
            seen = _seen_keys(some_rows, tokens, chunk_length, choices)
            outputs.append(_attend(some_rows, queries, k, v, seen, scale, choices.key_norm))
        return torch.cat(outputs, dim=2)


def _seen_keys(
    rows: Tensor, tokens: SortedTokens, chunk_length: int, choices: LSHChoices
) -> Tensor:
    """Return the positions of the keys in each row's two chunks of all rounds.

    The result is [batch, heads, m, keys], with n in place of a key that the row does not see.
    """
    order, mask = tokens.order, tokens.mask
    rounds, n = order.shape[-2:]
    round_, places, allowed = _neighbor_places(rows, tokens, chunk_length, choices)
    query_round = torch.arange(rounds, device=rows.device)[:, None, None]
    keys = _gather(order[-1], round_, places).long()
    allowed &= keys <= rows[:, None] if choices.attend_self else keys < rows[:, None]
    if choices.same_bucket:
        key_buckets = _gather(tokens.buckets[-1], round_, keys)
        same_bucket = tokens.buckets[0][..., rows, None] == key_buckets
        allowed &= same_bucket & (round_ == query_round)
    if mask is not None:
        batch = torch.arange(len(mask), device=rows.device).view(-1, 1, 1, 1, 1)
        allowed &= mask[batch, keys]
        if choices.mask_queries:
            allowed &= mask[:, None, None, rows, None]
    seen = keys.where(allowed, n).transpose(2, 3).flatten(3)
    if choices.correct_duplicates:
        seen = seen.sort(dim=-1).values
        repeated = seen[..., 1:] == seen[..., :-1]
        seen[..., 1:].masked_fill_(repeated, n)
    return seen


def _neighbor_places(
    rows: Tensor, tokens: SortedTokens, chunk_length: int, choices: LSHChoices
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places, in sorted order, of each row's chunk and the one before.

    Returns:
        The round of each place, the place in it, and whether there is a token that may be seen.
        All broadcast to [batch, heads, rounds, m, 2 * chunk_length].
    """
    rounds, n = tokens.order.shape[-2:]
    last_chunk = (n - 1) // chunk_length
    query_round = torch.arange(rounds, device=rows.device)[:, None, None]
    round_before = (query_round - 1) % rounds if choices.wrap == "rounds" else query_round
    chunk = tokens.ranks[0][..., rows, None].long() // chunk_length  # [b, h, rounds, m, 1]
    places = (chunk - 1) * chunk_length + torch.arange(2 * chunk_length, device=rows.device)
    wraps = places < 0
    places = torch.where(wraps, places + (last_chunk + 1) * chunk_length, places)
    round_ = torch.where(wraps, round_before, query_round)
    allowed = places < n
    if choices.wrap == "none":
        allowed &= ~wraps
    elif last_chunk == 0:  # the only chunk of a round must not see itself as the one before
        allowed &= ~wraps | (round_before != query_round)
    return round_, places.clamp(max=n - 1), allowed


def _gather(x: Tensor, round_: Tensor, index: Tensor) -> Tensor:
    """Return x[b, h, round_, index]."""
    flat_index = round_ * x.shape[-1] + index
    return x.flatten(2).gather(-1, flat_index.flatten(2)).view(flat_index.shape)


def _attend(
    rows: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, key_norm: str
) -> Tensor:
    """Compute softmax attention over the keys at `seen`.

    A row that sees no key gets its own value.
    """
    batch, heads, n = *q.shape[:2], k.shape[2]
    sum_dtype = dtypes.sum_dtype(q)
    example = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=q.device).view(-1, 1, 1)
    k_head, v_head = (head // (heads // x.shape[1]) for x in (k, v))
    index = seen.clamp(max=n - 1)
    keys = k[example, k_head, index].to(sum_dtype)
    values = v[example, v_head, index].to(sum_dtype)
    scores = (keys @ q.to(sum_dtype)[..., None])[..., 0]
    scores = scale * scores * _inverse_norm(keys, key_norm)
    weights = scores.masked_fill(seen == n, -torch.inf).softmax(dim=-1)
    out = (weights[..., None, :] @ values)[..., 0, :]
    query_values = v[example[..., 0], v_head[..., 0], rows].to(sum_dtype)
    sees_any = (seen < n).any(dim=-1, keepdim=True)
    return torch.where(sees_any, out, query_values).to(q.dtype)


def _inverse_norm(keys: Tensor, key_norm: str) -> Tensor | float:
    squares = keys.square().sum(dim=-1)
    if key_norm == "rms":
        return (squares + 1e-6 * keys.shape[-1]).rsqrt()
    return squares.sqrt().clamp(min=1e-12).reciprocal() if key_norm == "l2" else 1.0
