"""Batches whose rows run with different adapters: which row has which adapter."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RowAssignment(NamedTuple):
    """The adapter of each row of a batch, for one layer.

    `indices` is a tensor, so that torch.compile does not compile again for each order of rows.
    """

    names: tuple[str | None, ...]  # one for each row
    used: tuple[str | None, ...]  # names that add something in this layer, in the layer's order
    indices: Tensor  # place of each row's name in `used`, or -1


def assign_rows(
    names: Sequence[str | None], layer_names: Sequence[str | None], device: torch.device | None
) -> RowAssignment:
    """Return the assignment for a layer that has something to add for `layer_names`."""
    used = tuple(name for name in layer_names if name in names)
    indices = [used.index(name) if name in used else -1 for name in names]
    indices = torch.tensor(indices, dtype=torch.long, device=device)
    return RowAssignment(tuple(names), used, indices)


class RowAssignable(nn.Module):
    """A module that `mixed_batch` tells which adapter each row runs with."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: RowAssignment | None = None
        self.has_left_batch = False  # mixed_batch has ended, and nothing has run since

    def check_batch_not_left(self) -> None:
        """Raise RuntimeError if a checkpoint recomputes this module after mixed_batch has ended.

        The backward would recompute it with other adapters than the forward used.
        """
        if not torch.compiler.is_compiling() and self.has_left_batch:
            is_in_backward = torch._C._current_graph_task_id() != -1
            if is_in_backward:
                raise RuntimeError(
                    "mixed_batch was left before backward recomputed its layers; call backward "
                    "inside it"
                )
            self.has_left_batch = False


def run_by_adapter(
    x: Tensor, names: Sequence[str | None], run: Callable[[str | None, Tensor], Tensor]
) -> Tensor:
    """Call `run(name, rows of x)` once for each name, and return the results in x's row order."""
    if len(names) != len(x):
        raise ValueError(
            f"adapter_ids has {len(names)} names; x, of {len(x)} rows, needs one for each"
        )
    if len(set(names)) == 1:
        return run(names[0], x)
    outputs, order = [], []
    for name in dict.fromkeys(names):
        rows = [i for i, row_name in enumerate(names) if row_name == name]
        order += rows
        outputs.append(run(name, x[rows]))
    return torch.cat(outputs)[torch.tensor(order).argsort().to(x.device)]
