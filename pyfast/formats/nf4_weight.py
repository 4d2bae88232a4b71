"""NF4Weight: a weight in 4 bits, made of plain tensors."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyfast._support import checks
from pyfast.formats import nf4_codebooks


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """Tensor in 4 bits: value i is `code[nibble i of packed] * scale[i // blocksize]`.

    `nf4_quantize` makes it; `nf4_dequantize` and `nf4_linear` take it. In plain form `scale` is
    `absmax`. In nested form `absmax` itself is quantized, to 8 bits in blocks of 256:
    `scale[j] = nested_code[absmax[j]] * nested_absmax[j // 256] + offset`.
    All bytes are the same as bitsandbytes'.

    Args:
        packed: the codes, two in a byte, high nibble first; uint8, [ceil(numel / 2), 1].
        absmax: a scale for each block, [ceil(numel / blocksize)]; float32, or uint8 if nested.
        code: the 16 values of the code; float32, [16].
        shape: the shape of the tensor that was quantized.
        blocksize: how many values share a scale; a power of two from 32 to 4096.
        dtype: the dtype that was quantized, and to which `nf4_dequantize` returns by default.
        quant_type: "nf4" or "fp4".
        nested_absmax: nested only, a scale for each 256 of `absmax`; float32, [ceil(blocks / 256)].
        nested_code: nested only, the 256 values of the scales' code; float32, [256].
        offset: nested only, the mean of the scales; float32, [1].

    Raises:
        TypeError, ValueError: if dtypes, sizes or devices do not fit together.

    Example:
        >>> import torch, pyfast
        >>> w = pyfast.nf4_quantize(torch.randn(64, 64))
        >>> w
        NF4Weight(nf4, shape=[64, 64], blocksize=64, nested, 6.27 bits a value, torch.float32, cpu)
        >>> pyfast.nf4_dequantize(w).shape
        torch.Size([64, 64])
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype
    quant_type: str
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        check_state(self.state, self.shape, self.blocksize, self.quant_type)
        checks.one_of("dtype", self.dtype, checks.FLOATS)

    @property
    def nested(self) -> bool:
        """Return whether the scales are quantized, too."""
        return self.offset is not None

    @property
    def state(self) -> list[Tensor]:
        """The tensors in the order of the ops' arguments, STATE_NAMES: three, or six if nested."""
        plain = [self.packed, self.absmax, self.code]
        return [*plain, self.nested_absmax, self.nested_code, self.offset] if self.nested else plain

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors: packed values, scales and codes."""
        return sum(tensor.nbytes for tensor in self.state)

    def numel(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)

    def to(self, device: torch.device | str) -> "NF4Weight":
        """Return the same weight on another device."""
        moved = [tensor.to(device) for tensor in self.state]
        return replace(self, **dict(zip(STATE_NAMES, moved)))

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(self.numel(), 1)
        nested = ", nested" if self.nested else ""
        return (
            f"NF4Weight({self.quant_type}, shape={list(self.shape)}, blocksize={self.blocksize}"
            f"{nested}, {bits:.2f} bits a value, {self.dtype}, {self.device})"
        )


STATE_NAMES = ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset")


def empty_state(
    shape: tuple[int, ...],
    blocksize: int,
    quant_type: str,
    nested: bool,
    device: torch.device | str | None,
) -> list[Tensor]:
    """Return a state to load values into: every nibble and scale is zero."""
    expected = _expected_state(shape, blocksize, nested)
    state = [torch.zeros(size, dtype=dtype, device=device) for size, dtype in expected]
    state[2] = nf4_codebooks.CODE[quant_type].to(state[2].device, copy=True)
    if nested:
        state[4] = nf4_codebooks.NESTED_CODE.to(state[4].device, copy=True)
    return state


def check_state(
    state: list[Tensor], shape: tuple[int, ...], blocksize: int, quant_type: str
) -> None:
    """Check that the sizes, dtypes and devices of a state fit together."""
    checks.one_of("quant_type", quant_type, nf4_codebooks.QUANT_TYPES)
    checks.one_of("blocksize", blocksize, nf4_codebooks.BLOCKSIZES)
    expected_state = _expected_state(shape, blocksize, nested=len(state) > 3)
    for name, tensor, (size, dtype) in zip(STATE_NAMES, state, expected_state):
        checks.tensor(name, tensor, (dtype,))
        checks.shape(name, tensor, size)
        checks.same_device(name, tensor, "packed", state[0].device)
        checks.contiguous(name, tensor)


def _expected_state(
    shape: tuple[int, ...], blocksize: int, nested: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each tensor of a state."""
    numel = math.prod(shape)
    blocks = -(-numel // blocksize)
    plain = [((-(-numel // 2), 1), torch.uint8), ((blocks,), torch.float32), ((16,), torch.float32)]
    if not nested:
        return plain
    plain[1] = ((blocks,), torch.uint8)
    groups = -(-blocks // nf4_codebooks.NESTED_BLOCKSIZE)
    return [*plain, ((groups,), torch.float32), ((256,), torch.float32), ((1,), torch.float32)]
