"""SavedModule: a module of the model, and a trained copy of it for each adapter that asks for one."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyfast.lora_weights import check_name
from pyfast.mixed_rows import Rows, RowWrapper, rows_of


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
        return rows_of([name if name in self.copies else None for name in names], list(self.copies), None)

    def forward(self, *args, **kwargs):
        self.check_rows_left()
        if self.rows is None:
            return self.current(self.active)(*args, **kwargs)
        return self._forward_rows(*args, **kwargs)

    def _forward_rows(self, x: Tensor, *args, **kwargs) -> Tensor:
        names, parts, order = self.rows.names, [], []
        if len(names) != len(x):
            raise ValueError(f"adapter_ids has {len(names)} names; x, of {len(x)} rows, needs one for each")
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            order += rows
            parts.append(self.current(name)(x[rows], *args, **kwargs))
        return torch.cat(parts)[torch.tensor(order).argsort().to(x.device)]

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "base" not in modules:
                raise
            return getattr(self.current(self.__dict__.get("active")), name)
