"""The number format of the two streams of reversible blocks, and the checks of their range."""

import torch
from torch import Tensor


class StreamArithmetic:
    """The number format of the streams of one run, and its flags.

    The flags are int32 numbers for x1, x2, F0, G0, F1, ..., and a spare one at the end. A kernel
    writes 1 where a stream left the range, and 2 where a summand was not finite.
    """

    def __init__(self, exact: bool | str, fraction_bits: int, x: Tensor, n_blocks: int) -> None:
        self.exact = exact
        self.is_fixed_point = exact == "int32"
        self.fraction_bits = fraction_bits
        self.rounding_bits = fraction_bits if exact else -1  # -1: no rounding to multiples
        # The dtype of the streams, unless they are int32, and of the streams' gradients.
        self.dtype = torch.float32 if exact else x.dtype
        self.flags = torch.zeros(2 * n_blocks + 3, dtype=torch.int32, device=x.device)
        self.flags_on_cpu: Tensor | None = None
        self.flags_copied: torch.cuda.Event | None = None

    def flag(self, slot: int) -> Tensor:
        return self.flags[slot : slot + 1]

    def check_after_forward(self, differentiable: bool, recomputes: bool) -> None:
        """Raise for the flags of a forward, or have `check_after_backward` do so.

        Reading the flags waits for a GPU. Where a backward will recompute, the flags are read at
        its end, when the forward has long been done. Without gradients nothing is recomputed. Then
        floats beyond the bound are as good as any, but integers are not.
        """
        if not self.exact or self.flags.is_meta or not (differentiable or self.is_fixed_point):
            return
        if self.flags.is_cuda and differentiable and recomputes:
            self.flags_on_cpu = torch.empty_like(self.flags, device="cpu", pin_memory=True)
            self.flags_on_cpu.copy_(self.flags, non_blocking=True)
            self.flags_copied = torch.cuda.Event()
            self.flags_copied.record()
        else:
            self._raise_for(self.flags.tolist())

    def check_after_backward(self) -> None:
        if self.flags_copied is not None:
            self.flags_copied.synchronize()
            self._raise_for(self.flags_on_cpu.tolist())

    def _raise_for(self, flags: list[int]) -> None:
        slot = next((i for i, flag in enumerate(flags[:-1]) if flag), None)
        if slot is None:
            return
        where = f"x{slot + 1}" if slot < 2 else function_name((slot - 2) // 2, slot % 2)
        mode = f"exact={self.exact!r}, fraction_bits={self.fraction_bits}"
        if flags[slot] == 2:
            raise FloatingPointError(
                f"{where} has a value that is not finite; with {mode} all must be "
                "(exact=False lets them through)"
            )
        range_bits = 31 if self.is_fixed_point else 24
        bound = 2 ** (range_bits - self.fraction_bits)
        cure = ""
        if not self.is_fixed_point:
            cure = f'exact="int32" for up to {2 ** (31 - self.fraction_bits)}, or '
        raise OverflowError(
            f"with {where} a stream reached {bound}, the end of {mode}; use {cure}fewer "
            "fraction_bits, or exact=False"
        )


def function_name(block: int, index: int) -> str:
    """Return the name of a block's F (index 0) or G (index 1) for messages."""
    return f"blocks[{block}][{index}] ({'FG'[index]})"
