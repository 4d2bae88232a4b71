"""NF4Weight: a weight in 4 bits, as plain tensors."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyfast._support import checks
from pyfast.formats import nf4_codebooks


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A tensor of `shape`, quantized: value[i] = code[nibble i of packed] * scale[i // blocksize].

    Plain, scale = absmax (float32). Nested, absmax is itself quantized, to 8 bits in blocks of 256:
    scale = nested_code[absmax] * nested_absmax[.. // 256] + offset. The bytes are bitsandbytes'.
    """

    packed: Tensor  # uint8 [ceil(numel / 2), 1], high nibble first
    absmax: Tensor  # [ceil(numel / blocksize)], float32, or uint8 when nested
    code: Tensor  # float32 [16]
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype  # what was quantized, and what dequantizes by default
    quant_type: str
    nested_absmax: Tensor | None = None  # float32 [ceil(blocks / 256)]
    nested_code: Tensor | None = None  # float32 [256]
    offset: Tensor | None = None  # float32 [1]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        check_state(self.state, self.shape, self.blocksize, self.quant_type)
        checks.one_of("dtype", self.dtype, checks.FLOATS)

    @property
    def nested(self) -> bool:
        return self.offset is not None

    @property
    def state(self) -> list[Tensor]:
        """What the ops take: [packed, absmax, code], nested [.., nested_absmax, nested_code, offset]."""
        plain = [self.packed, self.absmax, self.code]
        return [*plain, self.nested_absmax, self.nested_code, self.offset] if self.nested else plain

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """All of it: packed values and scales."""
        return sum(tensor.nbytes for tensor in self.state)

    def numel(self) -> int:
        return math.prod(self.shape)

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same weight on another device."""
        moved = [tensor.to(device) for tensor in self.state]
        return replace(self, **dict(zip(STATE_NAMES, moved)))

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(self.numel(), 1)
        nested = ", nested" if self.nested else ""
        return (
            f"NF4Weight({self.quant_type}, shape={list(self.shape)}, blocksize={self.blocksize}{nested}, "
            f"{bits:.2f} bits a value, {self.dtype}, {self.device})"
        )


STATE_NAMES = ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset")


def empty_state(
    shape: tuple[int, ...],
    blocksize: int,
    quant_type: str,
    nested: bool,
    device: torch.device | str | None,
) -> list[Tensor]:
    """A state to load into: every nibble and scale zero."""
    expected = _expected(shape, blocksize, nested)
    state = [torch.zeros(size, dtype=dtype, device=device) for size, dtype in expected]
    state[2] = nf4_codebooks.CODE[quant_type].to(state[2].device, copy=True)
    if nested:
        state[4] = nf4_codebooks.NESTED_CODE.to(state[4].device, copy=True)
    return state


def check_state(
    state: list[Tensor], shape: tuple[int, ...], blocksize: int, quant_type: str
) -> None:
    """Sizes, dtypes and devices that fit together."""
    checks.one_of("quant_type", quant_type, nf4_codebooks.QUANT_TYPES)
    checks.one_of("blocksize", blocksize, nf4_codebooks.BLOCKSIZES)
    for name, tensor, (size, dtype) in zip(
        STATE_NAMES, state, _expected(shape, blocksize, len(state) > 3)
    ):
        checks.tensor(name, tensor, (dtype,))
        checks.shape(name, tensor, size)
        checks.same_device(name, tensor, "packed", state[0].device)
        checks.contiguous(name, tensor)


def _expected(
    shape: tuple[int, ...], blocksize: int, nested: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    numel = math.prod(shape)
    blocks = -(-numel // blocksize)
    plain = [((-(-numel // 2), 1), torch.uint8), ((blocks,), torch.float32), ((16,), torch.float32)]
    if not nested:
        return plain
    plain[1] = ((blocks,), torch.uint8)
    groups = -(-blocks // nf4_codebooks.NESTED_BLOCKSIZE)
    return [*plain, ((groups,), torch.float32), ((256,), torch.float32), ((1,), torch.float32)]
