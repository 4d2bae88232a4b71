"""TrainedCopies: a module of the model, with a trained copy for each adapter that asks for one."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from pyfast.adapters.module_names import check_adapter_name
from pyfast.adapters.row_assignment import (
    RowAssignable,
    RowAssignment,
    assign_rows,
    run_by_adapter,
)


class TrainedCopies(RowAssignable):
    """A module `base` and adapters' copies of it; calls and attributes go to the active one."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.train(base.training)

    def add(self, name: str) -> nn.Module:
        """Add a trainable copy of the base for an adapter, and return it."""
        check_adapter_name(name)
        self.copies[name] = copy.deepcopy(self.base).requires_grad_(True)
        return self.copies[name]

    def module_for(self, name: str | None) -> nn.Module:
        """Return the module that runs for the adapter: its copy, or the base if it has none."""
        return self.base if name is None or name not in self.copies else self.copies[name]

    def assign_rows(self, names: Sequence[str | None]) -> RowAssignment:
        """Return the assignment of these adapters, one for each row of a batch."""
        names = [name if name in self.copies else None for name in names]
        return assign_rows(names, list(self.copies), None)

    def forward(self, *args, **kwargs):
        self.check_batch_not_left()
        if self.rows is None:
            return self.module_for(self.active)(*args, **kwargs)
        return self._forward_rows(*args, **kwargs)

    def _forward_rows(self, x: Tensor, *args, **kwargs) -> Tensor:
        def run(name: str | None, rows: Tensor) -> Tensor:
            return self.module_for(name)(rows, *args, **kwargs)

        return run_by_adapter(x, self.rows.names, run)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "base" not in modules:
                raise
            return getattr(self.module_for(self.__dict__.get("active")), name)
