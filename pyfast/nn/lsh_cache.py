"""Decoding with LSH attention: what is kept of the tokens so far, and the attention of the newest
of them alone.

New tokens sort in among the earlier ones and so move the borders of their chunks. A step gives its
tokens what a forward over all tokens so far would, not one over the final sequence; earlier tokens'
results stay as they were.
"""

import weakref

import torch
from torch import Tensor

from pyfast._support import checks
from pyfast.reference.lsh_options import LSHChoices

_TOKENS = {"keys": 2, "values": 2, "buckets": 4, "mask": 1}  # the dimension that grows
_BATCH = {"keys": 0, "values": 0, "buckets": 1, "mask": 0}
_MOST_GATHERED = 2**24  # numbers at a time, of the keys and values that some rows see


class LSHCache:
    """The keys, values and bucket ids of one layer's tokens so far: `layer(x, cache=cache)` appends
    x's.

    Room doubles when it is used up, to no more than max_length. The first call chooses the
    rotations, and the number of buckets if the layer leaves it open: by its preset's rule for
    max_length tokens, or for the call's own. A step sorts the ids of all tokens, and attends to
    those in the chunks of the new ones only.
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None:
            checks.size("max_length", max_length)
        self.max_length = max_length
        self.length = 0
        self.factors: tuple[int, ...] = ()
        self.rotations: Tensor | None = None
        self._layer: weakref.ref | None = None
        self._room: dict[str, Tensor] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_layer": None}  # a copy goes on with the first layer that uses it

    def so_far(self, name: str) -> Tensor:
        """The tokens' "keys", "values", "buckets" or "mask"."""
        return self._room[name].narrow(_TOKENS[name], 0, self.length)

    def check(self, layer: object, keys: Tensor, n_hashes: int | None) -> None:
        """Whether a call of this layer, with these keys [batch, heads, length, dim], can go on from here."""
        if self.max_length is not None and self.length + keys.shape[2] > self.max_length:
            x = f"x has {keys.shape[2]} tokens and the cache {self.length}"
            raise ValueError(
                f"{x}; together they must be at most its max_length, {self.max_length}"
            )
        if self.length == 0:
            return
        self._layer = self._layer or weakref.ref(layer)
        if self._layer() is not layer:
            raise ValueError("cache has another layer's tokens; it must be this layer's own")
        held, rounds = self._room["keys"], self.rotations.shape[-2]
        if keys.shape[0] != held.shape[0]:
            raise ValueError(
                f"x has batch size {keys.shape[0]}; it must be the cache's, {held.shape[0]}"
            )
        checks.same_device("x", keys, "cache", held.device)
        checks.same_dtype("the layer's key", keys, "cache", held)
        if n_hashes not in (None, rounds):
            raise ValueError(
                f"n_hashes is {n_hashes}; it must be the {rounds} that cache was begun with"
            )

    def mark(self) -> int:
        """For `restore`, which forgets all that came since."""
        return self.length

    def restore(self, mark: int) -> None:
        """Back to a mark."""
        self.length = mark

    def begin(self, layer: object, factors: tuple[int, ...], rotations: Tensor) -> None:
        """What all calls share; `layer` is the only one that may go on."""
        self._layer, self.factors, self.rotations, self._room = (
            weakref.ref(layer),
            factors,
            rotations,
            {},
        )

    @torch.no_grad()
    def append(self, **tokens: Tensor) -> None:
        """By the names of `so_far`."""
        count = tokens["keys"].shape[2]
        for name, tensor in tokens.items():
            self._room[name] = self._with_room(name, tensor, self.length + count)
            self._room[name].narrow(_TOKENS[name], self.length, count).copy_(tensor)
        self.length += count

    def _with_room(self, name: str, like: Tensor, length: int) -> Tensor:
        dim, held = _TOKENS[name], self._room.get(name)
        if held is not None and held.shape[dim] >= length:
            return held
        capacity = max(length, 2 * self.length)
        size = list(like.shape)
        size[dim] = capacity if self.max_length is None else min(capacity, self.max_length)
        with torch.inference_mode(False):  # or it could not be written to outside
            room = torch.empty(size, dtype=like.dtype, device=like.device)
            if held is not None:
                room.narrow(dim, 0, self.length).copy_(self.so_far(name))
        return room

    @torch.no_grad()
    def reorder(self, indices: Tensor) -> None:
        """Example i becomes what example indices[i] was, as beam search asks; there may be more or fewer of them."""
        checks.examples("indices", indices, self._room["keys"].shape[0] if self._room else 0)
        with torch.inference_mode(False):
            for name, held in self._room.items():
                self._room[name] = held.index_select(_BATCH[name], indices.to(held.device))


def attend_rows(
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    ranks: Tensor,
    buckets: Tensor,
    mask: Tensor | None,
    chunk_length: int,
    scale: float,
    choices: LSHChoices,
) -> Tensor:
    """Causal LSH attention of a few tokens: [b, h, m, e], at the positions rows[m], of queries q[b,
    h, m, d].

    All else is of all n tokens, as reference.lsh_attention_op takes it: k[b, heads that divide h,
    n, d], v likewise, order, ranks and buckets [1 or 2, b, h, rounds, n], and mask[b, n].
    """
    width = 2 * chunk_length * order.shape[3] * (k.shape[-1] + v.shape[-1])
    at_once = max(1, _MOST_GATHERED // max(1, q.shape[0] * q.shape[1] * width))
    found = []
    with torch.autocast(q.device.type, enabled=False):
        for some, queries in zip(rows.split(at_once), q.split(at_once, dim=2)):
            seen = _keys_seen(some, order, ranks, buckets, mask, chunk_length, choices)
            found.append(_attend(some, queries, k, v, seen, scale, choices.key_norm))
        return torch.cat(found, dim=2)


def _keys_seen(rows, order, ranks, buckets, mask, chunk_length: int, choices: LSHChoices) -> Tensor:
    """The positions of the keys in each row's two chunks of all rounds, [b, h, m, keys]; n for one it does not see."""
    rounds, n = order.shape[-2:]
    last = (n - 1) // chunk_length
    own_round = torch.arange(rounds, device=rows.device)[:, None, None]
    round_before = (own_round - 1) % rounds if choices.wrap == "rounds" else own_round
    chunk = ranks[0][..., rows, None].long() // chunk_length  # [b, h, rounds, m, 1]
    place = (chunk - 1) * chunk_length + torch.arange(2 * chunk_length, device=rows.device)
    wraps = place < 0
    place = torch.where(wraps, place + (last + 1) * chunk_length, place)
    in_round = torch.where(wraps, round_before, own_round)
    allowed = place < n
    if choices.wrap == "none":
        allowed &= ~wraps
    elif last == 0:  # what is before the only chunk of a round is itself
        allowed &= ~wraps | (round_before != own_round)
    keys = _take(order[-1], in_round, place.clamp(max=n - 1)).long()
    allowed &= keys <= rows[:, None] if choices.attend_self else keys < rows[:, None]
    if choices.same_bucket:
        same = buckets[0][..., rows, None] == _take(buckets[-1], in_round, keys)
        allowed &= same & (in_round == own_round)
    if mask is not None:
        allowed &= mask[torch.arange(len(mask), device=rows.device).view(-1, 1, 1, 1, 1), keys]
        if choices.mask_queries:
            allowed &= mask[:, None, None, rows, None]
    seen = keys.where(allowed, n).transpose(2, 3).flatten(3)
    if choices.correct_duplicates:
        seen = seen.sort(dim=-1).values
        again = seen[..., 1:] == seen[..., :-1]
        seen[..., 1:].masked_fill_(again, n)
    return seen


def _take(x: Tensor, in_round: Tensor, at: Tensor) -> Tensor:
    """x[b, h, in_round, at]"""
    index = in_round * x.shape[-1] + at
    return x.flatten(2).gather(-1, index.flatten(2)).view(index.shape)


def _attend(rows, q, k, v, seen, scale: float, key_norm: str) -> Tensor:
    batch, heads, n = *q.shape[:2], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    example = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=q.device).view(-1, 1, 1)
    k_head, v_head = (head // (heads // x.shape[1]) for x in (k, v))
    at = seen.clamp(max=n - 1)
    keys, values = k[example, k_head, at].to(wide), v[example, v_head, at].to(wide)
    scores = scale * (keys @ q.to(wide)[..., None])[..., 0] * _inverse_length(keys, key_norm)
    weights = scores.masked_fill(seen == n, -torch.inf).softmax(dim=-1)
    out = (weights[..., None, :] @ values)[..., 0, :]
    own = v[example[..., 0], v_head[..., 0], rows].to(wide)
    return torch.where((seen < n).any(dim=-1, keepdim=True), out, own).to(q.dtype)


def _inverse_length(keys: Tensor, key_norm: str) -> Tensor | float:
    squares = keys.square().sum(dim=-1)
    if key_norm == "rms":
        return (squares + 1e-6 * keys.shape[-1]).rsqrt()
    return squares.sqrt().clamp(min=1e-12).reciprocal() if key_norm == "l2" else 1.0
