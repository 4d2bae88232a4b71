"""SavedModule: a module of the model, and a trained copy of it for each adapter that asks for one."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from pyfast.adapters.mixed_batch import Rows, RowWrapper, by_adapter, rows_of
from pyfast.adapters.module_names import check_name


class SavedModule(RowWrapper):
    """`base`, or the active adapter's own copy of it; attributes are those of the one that runs."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.train(base.training)

    def add(self, name: str) -> nn.Module:
        """A new copy, trainable."""
        check_name(name)
        self.copies[name] = copy.deepcopy(self.base).requires_grad_(True)
        return self.copies[name]

    def current(self, name: str | None) -> nn.Module:
        """What runs for the adapter."""
        return self.base if name is None or name not in self.copies else self.copies[name]

    def rows_of(self, names: Sequence[str | None]) -> Rows:
        """These adapters, one for each row of a batch."""
        return rows_of(
            [name if name in self.copies else None for name in names], list(self.copies), None
        )

    def forward(self, *args, **kwargs):
        self.check_rows_left()
        if self.rows is None:
            return self.current(self.active)(*args, **kwargs)
        return self._forward_rows(*args, **kwargs)

    def _forward_rows(self, x: Tensor, *args, **kwargs) -> Tensor:
        return by_adapter(
            x, self.rows.names, lambda name, rows: self.current(name)(rows, *args, **kwargs)
        )

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "base" not in modules:
                raise
            return getattr(self.current(self.__dict__.get("active")), name)
