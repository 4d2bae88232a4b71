"""The configuration of a Reformer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyfast._support import checks
from pyfast.nn.attention_checks import check_sizes
from pyfast.ops import lsh_hash
from pyfast.ops.lsh_attention import check_chunk, check_options
from pyfast.ops.reversible import check_mode
from pyfast.reference import lsh_options

ATTENTIONS = ("lsh", "local")
POSITIONS = ("axial", "learned", "rotary", "none")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class ReformerConfig:
    """The sizes and options of a `Reformer`.

    Args:
        vocab_size: int; the number of tokens.
        width: int, 256; the size of a token in each of the two streams.
        layers: sequence of "lsh" and "local"; the attention of each layer. ("local", "lsh") * 3.
        heads: int, 4; the heads of every attention.
        head_dim: int up to 256; width / heads by default.
        hidden: int; the width within a feed-forward. 4 width by default.
        activation: "relu", "gelu" (the default), "gelu_tanh" or "silu".
        max_length: int, 4096; the most tokens. With "rotary" or "none" positions there can be more.
        positions: "axial" (the default): a position is a row and a column, with a vector each.
            "learned": each position has a vector. "rotary": queries and keys are rotated. "none".
        axial_shape: (rows, columns); by default the squarest that hold max_length.
        axial_widths: the sizes of a row's and of a column's vector. By default a quarter and three
            quarters of width.
        n_hashes: int, 2; rounds of lsh_hash.
        n_buckets: even int, or a tuple of even factors; by default the preset's rule for each
            length.
        lsh_chunk: int, 64; tokens in a chunk of an "lsh" layer: 16 to 256, a multiple of 16.
        local_chunk: int, 64; tokens in a chunk of a "local" layer: 16 to 256, a multiple of 16.
        preset: str, "trax"; see `lsh_attention`.
        hash_seed: int; seeds the rotations, which are then the same at every call. By default they
            are new ones.
        dropout: float, 0; the dropout of embeddings and of what layers add to a stream.
        lsh_dropout: float, 0; the dropout of the weights of "lsh" attention.
        local_dropout: float, 0; the dropout of the weights of "local" attention.
        tied: bool, True; the head is the embedding and reads the mean of the streams. Otherwise it
            is a layer of its own and reads both streams.
        head_bias: bool, False; whether a head that is not tied has a bias.
        norm_eps: float, 1e-5; the epsilon of the layer norms.
        exact: "auto" (the default), True, "int32" or False; see `reversible`.
        fraction_bits: int, 16; see `reversible`.
        store: bool, False; keep activations, for comparison.
        feed_forward_chunk: int, 16384; tokens of a sequence at a time in a feed-forward. None: all.
        init_std: float, 0.02; the standard deviation of new weights.
        pad_to: int; lengths above the smallest chunk are padded to a multiple of it, as
            transformers does in evaluation. No token sees the padding. By default nothing is
            padded.
        pad_id: int, 0; the token to pad with.
        end_id: int or a tuple of int; the tokens that end what `generate` makes. None by default.

    Example:
        >>> import pyfast
        >>> config = pyfast.ReformerConfig(vocab_size=320, width=512, heads=8, max_length=1 << 16)
        >>> config.head_dim, config.hidden, config.axial_shape
        (64, 2048, (256, 256))
    """

    vocab_size: int
    width: int = 256
    layers: Sequence[str] = ("local", "lsh") * 3
    heads: int = 4
    head_dim: int | None = None
    hidden: int | None = None
    activation: str = "gelu"
    max_length: int = 4096
    positions: str = "axial"
    axial_shape: tuple[int, int] | None = None
    axial_widths: tuple[int, int] | None = None
    n_hashes: int = 2
    n_buckets: int | tuple[int, ...] | None = None
    lsh_chunk: int = 64
    local_chunk: int = 64
    preset: str = "trax"
    hash_seed: int | None = None
    dropout: float = 0.0
    lsh_dropout: float = 0.0
    local_dropout: float = 0.0
    tied: bool = True
    head_bias: bool = False
    norm_eps: float = 1e-5
    exact: bool | str = "auto"
    fraction_bits: int = 16
    store: bool = False
    feed_forward_chunk: int | None = 1 << 14
    init_std: float = 0.02
    pad_to: int | None = None
    pad_id: int = 0
    end_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_ids()
        self._check_layers()
        for name, allowed in (("positions", POSITIONS), ("activation", ACTIVATIONS)):
            checks.one_of(name, getattr(self, name), allowed)
        lsh_options.resolve(self.preset, False)
        lsh_hash.check_rounds(self.n_hashes, None)
        lsh_hash.check_hash_seed(self.hash_seed)
        if self.n_buckets is not None:
            lsh_hash.check_n_buckets(self.n_buckets)
        check_mode(self.exact, self.fraction_bits)
        for name in ("axial_shape", "axial_widths"):
            _check_pair(name, getattr(self, name))
        self._set_defaults()
        self._check_positions()

    def _set_defaults(self) -> None:
        """Replace None by the default that depends on other fields, and lists by tuples."""
        quarter = max(1, self.width // 4)
        values = {
            "layers": tuple(self.layers),
            "head_dim": self.head_dim or self.width // self.heads,
            "hidden": self.hidden or 4 * self.width,
            "n_buckets": _as_hashable(self.n_buckets),
            "axial_shape": tuple(self.axial_shape or _squarest_shape(self.max_length)),
            "axial_widths": tuple(self.axial_widths or (quarter, self.width - quarter)),
            "end_id": _as_hashable(self.end_id),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_layers(self) -> None:
        layers = self.layers
        is_sequence = isinstance(layers, Sequence) and not isinstance(layers, str)
        if not is_sequence or len(layers) == 0 or not all(map(_is_attention, layers)):
            raise ValueError(f"layers is {layers!r}; it must be a sequence of 'lsh' and 'local'")

    def _check_numbers(self) -> None:
        sizes = ("vocab_size", "max_length", "hidden", "feed_forward_chunk", "pad_to")
        for name in sizes:
            value = getattr(self, name)
            if value is None and name not in ("vocab_size", "max_length"):
                continue
            checks.size(name, value)
            if value == 0:
                raise ValueError(f"{name} is 0; it must be at least 1")
        check_sizes(self.width, self.heads, self.head_dim, None)
        for name in ("lsh_chunk", "local_chunk"):
            check_chunk(name, getattr(self, name))
        for name in ("dropout", "lsh_dropout", "local_dropout"):
            check_options(self.lsh_chunk, True, name, getattr(self, name))
        for name in ("norm_eps", "init_std"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= _LARGEST:
                raise ValueError(f"{name} is {value!r}; it must be a finite number, 0 or more")
        for name in ("tied", "head_bias", "store"):
            checks.instance(name, getattr(self, name), bool)
        if self.tied and self.head_bias:
            raise ValueError("head_bias is True; with tied it must be False, an embedding has none")

    def _check_ids(self) -> None:
        if not self._is_id(self.pad_id):
            raise ValueError(
                f"pad_id is {self.pad_id!r}; it must be an id, 0 to {self.vocab_size - 1}"
            )
        end_ids = self.end_id if isinstance(self.end_id, tuple | list) else (self.end_id,)
        if self.end_id is not None and not (end_ids and all(map(self._is_id, end_ids))):
            raise ValueError(
                f"end_id is {self.end_id!r}; it must be None, an id, "
                f"0 to {self.vocab_size - 1}, or several"
            )

    def _is_id(self, value: object) -> bool:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return is_integer and 0 <= value < self.vocab_size

    def _check_positions(self) -> None:
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; with rotary positions it must be even")
        if self.positions != "axial":
            return
        if self.width == 1:
            raise ValueError("width is 1; with axial positions it must be at least 2")
        rows, columns = self.axial_shape
        if rows * columns < self.max_length:
            raise ValueError(
                f"axial_shape is {self.axial_shape}; it must hold max_length, {self.max_length}"
            )
        if sum(self.axial_widths) != self.width:
            raise ValueError(
                f"axial_widths is {self.axial_widths}; it must add up to width, {self.width}"
            )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return `end_id` as a tuple, which is empty for None."""
        if self.end_id is None:
            return ()
        return self.end_id if isinstance(self.end_id, tuple) else (self.end_id,)

    def chunk(self, layer_type: str) -> int:
        """Return the number of tokens in a chunk of an "lsh" or a "local" layer."""
        return self.lsh_chunk if layer_type == "lsh" else self.local_chunk


def _is_attention(value: object) -> bool:
    return isinstance(value, str) and value in ATTENTIONS


def _squarest_shape(length: int) -> tuple[int, int]:
    rows = math.isqrt(length)
    return rows, -(-length // rows)


def _check_pair(name: str, value: object) -> None:
    pair = value if isinstance(value, tuple | list) else ()
    sizes = [n for n in pair if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if value is not None and not len(pair) == len(sizes) == 2:
        raise ValueError(f"{name} is {value!r}; it must be two positive integers")


def _as_hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
