"""Reversible blocks as a module."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pyfast.ops.reversible import check_mode, list_pairs, reversible


class ReversibleSequence(nn.Module):
    """A module of reversible blocks: `seq(x1, x2)` is `reversible(blocks, x1, x2)`.

    The functions are its attributes f0, g0, f1, g1, ... Those that are modules are its submodules,
    in this order.

    Args:
        blocks: [(f, g), ...]; modules or other callables that map a tensor to one of its shape.
        exact: "auto" (the default), True, "int32" or False; see `reversible`.
        fraction_bits: int, 16 by default; see `reversible`.
        store: bool, False by default; keep activations, for comparison.

    Example:
        >>> import torch, pyfast
        >>> blocks = [(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(3)]
        >>> seq = pyfast.ReversibleSequence(blocks)
        >>> x = torch.randn(2, 5, 8)
        >>> y1, y2 = seq(x, x)
        >>> (y1 + y2).sum().backward()
        >>> y1.shape, seq.f0.weight.grad.shape
        (torch.Size([2, 5, 8]), torch.Size([8, 8]))
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
        self.n_blocks = len(pairs)
        self.exact, self.fraction_bits, self.store = exact, fraction_bits, store
        for i, (f, g) in enumerate(pairs):
            setattr(self, f"f{i}", f)
            setattr(self, f"g{i}", g)

    def blocks(self) -> list[tuple[Callable, Callable]]:
        """Return the pairs (f, g) as they are now; adapters and wrappers may have replaced some."""
        return [(getattr(self, f"f{i}"), getattr(self, f"g{i}")) for i in range(self.n_blocks)]

    def forward(self, x1: Tensor, x2: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        """Run the blocks.

        Args:
            x1: Tensor; the first stream.
            x2: Tensor like x1; the second one. It may be x1 itself.
            *args: passed to every F and G, after the stream.
            **kwargs: passed to every F and G, but for return_hidden, f_kwargs and g_kwargs, which
                `reversible` takes.

        Returns:
            (y1, y2), or with return_hidden (y1, y2, [(h1, h2), ...]), all in the dtype of x1.
        """
        modes = {"exact": self.exact, "fraction_bits": self.fraction_bits, "store": self.store}
        return reversible(self.blocks(), x1, x2, *args, **modes, **kwargs)

    def extra_repr(self) -> str:
        return f"exact={self.exact!r}, fraction_bits={self.fraction_bits}, store={self.store}"
