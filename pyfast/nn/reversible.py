"""Reversible blocks as a module."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pyfast.ops.reversible import check_mode, list_pairs, reversible


class ReversibleSequence(nn.Module):
    """Reversible blocks as a module: `seq(x1, x2)` is `reversible(blocks, x1, x2)`.

    The functions are its attributes f0, g0, f1, g1, ...; those that are modules are its submodules,
    in this order.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[Callable, Callable]],
        *,
        exact: bool | str = "auto",
        fraction_bits: int = 16,
        store: bool = False,
    ) -> None:
        super().__init__()
        pairs = list_pairs(blocks)
        check_mode(exact, fraction_bits)
        self.n_blocks, self.exact, self.fraction_bits, self.store = (
            len(pairs),
            exact,
            fraction_bits,
            store,
        )
        for i, pair in enumerate(pairs):
            for letter, function in zip("fg", pair):
                setattr(self, f"{letter}{i}", function)

    def blocks(self) -> list[tuple[Callable, Callable]]:
        """As they are now: adapters, compilers and wrappers may have replaced some."""
        return [(getattr(self, f"f{i}"), getattr(self, f"g{i}")) for i in range(self.n_blocks)]

    def forward(self, x1: Tensor, x2: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        """As `reversible`, with its return_hidden, f_kwargs and g_kwargs, and whatever F and G take."""
        modes = {"exact": self.exact, "fraction_bits": self.fraction_bits, "store": self.store}
        return reversible(self.blocks(), x1, x2, *args, **modes, **kwargs)

    def extra_repr(self) -> str:
        return f"exact={self.exact!r}, fraction_bits={self.fraction_bits}, store={self.store}"
