"""What a Reformer is made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyfast._support import checks
from pyfast.nn.attention_checks import check_sizes
from pyfast.ops import lsh_hash as hashing
from pyfast.ops.lsh_attention import check_chunk, check_options
from pyfast.ops.reversible import check_mode
from pyfast.reference import lsh_options

ATTENTIONS = ("lsh", "local")
POSITIONS = ("axial", "learned", "rotary", "none")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class ReformerConfig:
    """The sizes and choices of a `Reformer`.

    Args:
        vocab_size: how many tokens there are. width: of a token in the model; each of the two
        streams has it. layers: "lsh" or "local" for each layer. heads: of every attention.
        head_dim: up to 256; width / heads by default. hidden: the width within a feed-forward; 4
        width by default. activation: "relu", "gelu", "gelu_tanh" or "silu". max_length: the most
        tokens; with "rotary" or "none" positions there can be more. positions: "axial": a position
        is a row and a column, with a vector each; "learned": a vector each; "rotary": in
            the attentions; "none".
        axial_shape: rows and columns; by default the squarest that hold max_length. axial_widths:
        of a row's and of a column's vector; by default a quarter and three quarters of width.
        n_hashes: rounds of hashing. n_buckets: even, or even factors; by default the preset's rule
        for each length. lsh_chunk: tokens in a chunk of an "lsh" layer: 16 to 256, a multiple of
        16. local_chunk: the same, of a "local" layer. preset: see `lsh_attention`. hash_seed: of
        the rotations, the same at every call; by default new ones. dropout: of embeddings and of
        what layers add. lsh_dropout: of the weights of "lsh" attention. local_dropout: of the
        weights of "local" attention. tied: the head is the embedding, of the streams' mean;
        otherwise a layer of its own, of both. head_bias: whether a head that is not tied has a
        bias. norm_eps: of the layer norms. exact: see `reversible`. fraction_bits: likewise. store:
        keep activations, for comparison. feed_forward_chunk: tokens of a sequence at a time in a
        feed-forward; None: all. init_std: of the weights. pad_to: lengths above the smallest chunk
        are filled up to a multiple, as transformers does in evaluation, with
            tokens that nothing sees.
        pad_id: the token that fills up.
        end_id: the token that ends what `generate` makes, or a tuple of such tokens.
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
        whole = (
            isinstance(self.layers, Sequence)
            and not isinstance(self.layers, str)
            and len(self.layers) > 0
        )
        if not whole or not all(
            isinstance(kind, str) and kind in ATTENTIONS for kind in self.layers
        ):
            raise ValueError(
                f"layers is {self.layers!r}; it must be a sequence of 'lsh' and 'local'"
            )
        for name, allowed in (("positions", POSITIONS), ("activation", ACTIVATIONS)):
            checks.one_of(name, getattr(self, name), allowed)
        lsh_options.resolve(self.preset, False)
        hashing.check_rounds(self.n_hashes, None)
        hashing.check_hash_seed(self.hash_seed)
        if self.n_buckets is not None:
            hashing.check_n_buckets(self.n_buckets)
        check_mode(self.exact, self.fraction_bits)
        for name in ("axial_shape", "axial_widths"):
            _check_pair(name, getattr(self, name))
        quarter = max(1, self.width // 4)
        settled = {
            "layers": tuple(self.layers),
            "head_dim": self.head_dim or self.width // self.heads,
            "hidden": self.hidden or 4 * self.width,
            "n_buckets": _hashable(self.n_buckets),
            "axial_shape": tuple(self.axial_shape or _squarest(self.max_length)),
            "axial_widths": tuple(self.axial_widths or (quarter, self.width - quarter)),
            "end_id": _hashable(self.end_id),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        self._check_positions()

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
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value <= _LARGEST
            ):
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
        several = self.end_id if isinstance(self.end_id, tuple | list) else (self.end_id,)
        if self.end_id is not None and not (several and all(map(self._is_id, several))):
            raise ValueError(
                f"end_id is {self.end_id!r}; it must be None, an id, 0 to {self.vocab_size - 1}, or several"
            )

    def _is_id(self, value: object) -> bool:
        return (
            isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self.vocab_size
        )

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
        """Those of `end_id`, however many."""
        if self.end_id is None:
            return ()
        return self.end_id if isinstance(self.end_id, tuple) else (self.end_id,)

    def chunk(self, kind: str) -> int:
        """Tokens in a chunk of this kind of layer."""
        return self.lsh_chunk if kind == "lsh" else self.local_chunk


def _squarest(length: int) -> tuple[int, int]:
    rows = math.isqrt(length)
    return rows, -(-length // rows)


def _check_pair(name: str, value: object) -> None:
    pair = value if isinstance(value, tuple | list) else ()
    whole = [n for n in pair if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if value is not None and not len(pair) == len(whole) == 2:
        raise ValueError(f"{name} is {value!r}; it must be two positive integers")


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
