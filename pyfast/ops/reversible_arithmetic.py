"""The arithmetic of the two streams of reversible blocks."""

import torch
from torch import Tensor


class _Arithmetic:
    """How the streams of one run are kept, and its overflow flags: of x1, x2, F0, G0, F1, ..., and a spare one."""

    def __init__(self, exact: bool | str, bits: int, x: Tensor, n_blocks: int) -> None:
        self.exact, self.fixed, self.fraction_bits = exact, exact == "int32", bits
        self.bits = bits if exact else -1
        self.dtype = (
            torch.float32 if exact else x.dtype
        )  # of the streams' gradients, and of streams but int32 ones
        self.flags = torch.zeros(2 * n_blocks + 3, dtype=torch.int32, device=x.device)
        self.copy = self.copied = None

    def flag(self, slot: int) -> Tensor:
        return self.flags[slot : slot + 1]

    def after_forward(self, differentiable: bool, replayed: bool) -> None:
        """Looks at the flags; where that means to wait for a GPU, in the backward, when the forward
        is long done.

        Without gradients nothing is computed again, and floats are as good as any beyond the bound;
        integers are not.
        """
        if not self.exact or self.flags.is_meta or not (differentiable or self.fixed):
            return
        if self.flags.is_cuda and differentiable and replayed:
            self.copy = torch.empty_like(self.flags, device="cpu", pin_memory=True)
            self.copy.copy_(self.flags, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self._raise_for(self.flags.tolist())

    def after_backward(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
            self._raise_for(self.copy.tolist())

    def _raise_for(self, flags: list[int]) -> None:
        slot = next((i for i, flag in enumerate(flags[:-1]) if flag), None)
        if slot is None:
            return
        where = f"x{slot + 1}" if slot < 2 else _name((slot - 2) // 2, slot % 2)
        mode = f"exact={self.exact!r}, fraction_bits={self.fraction_bits}"
        if flags[slot] == 2:
            raise FloatingPointError(
                f"{where} has a value that is not finite; with {mode} all must be (exact=False lets them through)"
            )
        bound = 2 ** ((31 if self.fixed else 24) - self.fraction_bits)
        cure = (
            "" if self.fixed else f'exact="int32" for up to {2 ** (31 - self.fraction_bits)}, or '
        )
        raise OverflowError(
            f"with {where} a stream reached {bound}, the end of {mode}; use {cure}fewer fraction_bits, or exact=False"
        )


def _name(block: int, half: int) -> str:
    return f"blocks[{block}][{half}] ({'FG'[half]})"
