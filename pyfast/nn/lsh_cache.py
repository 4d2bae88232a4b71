"""The cache of an LSH attention layer for decoding."""

import weakref

import torch
from torch import Tensor

from pyfast._support import checks

_TOKEN_DIM = {"keys": 2, "values": 2, "buckets": 4, "mask": 1}
_BATCH_DIM = {"keys": 0, "values": 0, "buckets": 1, "mask": 0}


class LSHCache:
    """The keys, values and bucket ids of one layer's tokens so far.

    `layer(x, cache=cache)` continues from the tokens in the cache, and appends x.

    The memory doubles when it is used up, to no more than max_length. The first call chooses the
    rotations. If the layer leaves the number of buckets open it chooses that too, by the preset's
    rule for max_length tokens, or for the call's own. A step sorts the ids of all tokens, and
    attends only to those in the chunks of the new ones.

    Args:
        max_length: int; the most tokens there can be. Any number by default.

    Attributes:
        length: the number of tokens so far.

    Example:
        >>> import torch, pyfast
        >>> layer = pyfast.LSHSelfAttention(64, 4, chunk_length=16)
        >>> cache = pyfast.LSHCache(max_length=256)
        >>> y = layer(torch.randn(2, 100, 64), cache=cache)
        >>> layer(torch.randn(2, 1, 64), cache=cache).shape, cache.length
        (torch.Size([2, 1, 64]), 101)
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None:
            checks.size("max_length", max_length)
        self.max_length = max_length
        self.length = 0
        self.factors: tuple[int, ...] = ()  # of the number of buckets
        self.rotations: Tensor | None = None
        self._layer: weakref.ref | None = None
        self._storage: dict[str, Tensor] = {}  # with room for more tokens than there are

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_layer": None}  # a copy is for the first layer that uses it

    def so_far(self, name: str) -> Tensor:
        """Return the "keys", "values", "buckets" or "mask" of all tokens."""
        return self._storage[name].narrow(_TOKEN_DIM[name], 0, self.length)

    def check(self, layer: object, keys: Tensor, n_hashes: int | None) -> None:
        """Check that a call of this layer with these keys can continue from here.

        Args:
            layer: the LSHSelfAttention.
            keys: [batch, heads, length, dim]; of the call's tokens.
            n_hashes: the rounds that the call asks for, or None.
        """
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
        held, rounds = self._storage["keys"], self.rotations.shape[-2]
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
        """Return the state of the cache for `restore`."""
        return self.length

    def restore(self, mark: int) -> None:
        """Forget all tokens that came since `mark`."""
        self.length = mark

    def begin(self, layer: object, factors: tuple[int, ...], rotations: Tensor) -> None:
        """Set what all calls share; `layer` is the only one that can continue."""
        self._layer = weakref.ref(layer)
        self.factors, self.rotations = factors, rotations
        self._storage = {}

    @torch.no_grad()
    def append(self, **tokens: Tensor) -> None:
        """Append tokens, passed by the names of `so_far`."""
        count = tokens["keys"].shape[2]
        for name, tensor in tokens.items():
            self._storage[name] = self._grow(name, tensor, self.length + count)
            self._storage[name].narrow(_TOKEN_DIM[name], self.length, count).copy_(tensor)
        self.length += count

    def _grow(self, name: str, like: Tensor, length: int) -> Tensor:
        """Return the storage of `name`, or a larger copy of it if `length` tokens do not fit."""
        dim, storage = _TOKEN_DIM[name], self._storage.get(name)
        if storage is not None and storage.shape[dim] >= length:
            return storage
        capacity = max(length, 2 * self.length)
        shape = list(like.shape)
        shape[dim] = capacity if self.max_length is None else min(capacity, self.max_length)
        with torch.inference_mode(False):  # else it could not be written to outside of it
            larger = torch.empty(shape, dtype=like.dtype, device=like.device)
            if storage is not None:
                larger.narrow(dim, 0, self.length).copy_(self.so_far(name))
        return larger

    @torch.no_grad()
    def reorder(self, indices: Tensor) -> None:
        """Replace example i by what example indices[i] was, as beam search asks.

        Args:
            indices: [new batch size], int64 or int32; there may be more or fewer than now.
        """
        batch = self._storage["keys"].shape[0] if self._storage else 0
        checks.examples("indices", indices, batch)
        with torch.inference_mode(False):
            for name, storage in self._storage.items():
                self._storage[name] = storage.index_select(
                    _BATCH_DIM[name], indices.to(storage.device)
                )
