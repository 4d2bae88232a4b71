"""The cache of a Reformer for decoding."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pyfast.models.reformer.config import ReformerConfig
from pyfast.nn.local_attention import LocalCache
from pyfast.nn.lsh_cache import LSHCache


class ReformerCache:
    """The caches of all layers of a model, for decoding.

    `model(ids, cache=cache)` continues from the tokens in the cache, and appends ids.

    Args:
        model: Reformer, also one that torch.compile wraps; the only model that can use the cache.
        max_length: int or None (the default); the most tokens there can be. It decides into how
            many buckets tokens are hashed.

    Attributes:
        length: the number of tokens so far.
        layers: one LSHCache or LocalCache for each layer.

    Example:
        >>> import torch, pyfast
        >>> config = pyfast.ReformerConfig(vocab_size=50, width=32, max_length=256)
        >>> model = pyfast.Reformer(config).eval()
        >>> cache = pyfast.ReformerCache(model, max_length=256)
        >>> prompt = torch.randint(50, (2, 100))
        >>> logits = model(prompt, cache=cache)
        >>> next_ids = logits[:, -1:].argmax(-1)
        >>> model(next_ids, cache=cache).shape, cache.length
        (torch.Size([2, 1, 50]), 101)
    """

    def __init__(self, model: nn.Module, max_length: int | None = None) -> None:
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper calls this one
        config = getattr(model, "config", None)
        if not isinstance(config, ReformerConfig):
            raise TypeError(f"model must be a Reformer, not {type(model).__name__}")
        self.layers = []
        for layer_type in config.layers:
            self.layers.append(LSHCache(max_length) if layer_type == "lsh" else LocalCache())
        self.length = 0
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_model": None}  # a copy is for the first model that uses it

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless the cache is of this model."""
        types = []
        for layer_type in model.config.layers:
            types.append(LSHCache if layer_type == "lsh" else LocalCache)
        self._model = self._model or weakref.ref(model)
        if self._model() is not model or [type(layer) for layer in self.layers] != types:
            raise ValueError("cache is of another model; it must be this model's own")

    def reorder(self, indices: Tensor) -> None:
        """Replace example i by what example indices[i] was, as beam search asks.

        Args:
            indices: [new batch size], int64 or int32; there may be more or fewer than now.
        """
        for layer in self.layers:
            layer.reorder(indices)

    @contextmanager
    def appending(self, count: int) -> Iterator[None]:
        """Append `count` tokens in a block that calls all layers; if it fails, to none of them."""
        marks = [layer.mark() for layer in self.layers]
        try:
            yield
        except BaseException:
            for layer, mark in zip(self.layers, marks):
                layer.restore(mark)
            raise
        self.length += count
