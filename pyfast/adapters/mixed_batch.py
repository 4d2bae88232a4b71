"""A batch whose rows run with different adapters: whose rows they are, and a layer's sum over them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """Which adapter is for which row; torch.compile sees a tensor, and not another composition each time."""

    names: tuple[str | None, ...]
    used: tuple[str | None, ...]  # the different ones that add something, in the layer's order
    ids: Tensor  # of each row, its place in `used`, or -1


def rows_of(names: Sequence[str | None], known: Sequence[str | None], device: torch.device) -> Rows:
    """The rows of a layer that has something to add for the `known`."""
    used = tuple(name for name in known if name in names)
    ids = [used.index(name) if name in used else -1 for name in names]
    return Rows(tuple(names), used, torch.tensor(ids, dtype=torch.long, device=device))


class RowWrapper(nn.Module):
    """A module that `mixed_batch` tells which adapter is for which row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Rows | None = None
        self.rows_left = False  # mixed_batch was left, and nothing has run since

    def check_rows_left(self) -> None:
        """A checkpoint computes again in the backward; that is not to be with other adapters than at first."""
        if not torch.compiler.is_compiling() and self.rows_left:
            if torch._C._current_graph_task_id() != -1:  # inside a backward
                raise RuntimeError(
                    "mixed_batch was left before backward recomputed its layers; call backward inside it"
                )
            self.rows_left = False


def by_adapter(
    x: Tensor, names: Sequence[str | None], run: Callable[[str | None, Tensor], Tensor]
) -> Tensor:
    """`run(name, its rows of x)` for each name, the rows in order again."""
    if len(names) != len(x):
        raise ValueError(
            f"adapter_ids has {len(names)} names; x, of {len(x)} rows, needs one for each"
        )
    if len(set(names)) == 1:
        return run(names[0], x)
    parts, order = [], []
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        order += rows
        parts.append(run(name, x[rows]))
    return torch.cat(parts)[torch.tensor(order).argsort().to(x.device)]
