"""AdapterHost: a frozen layer with named adapters of any type."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from pyfast.adapters.module_names import check_adapter_name
from pyfast.adapters.row_assignment import RowAssignable, RowAssignment


class AdapterHost(RowAssignable):
    """A frozen layer `base` with named adapters, of which at most one is active.

    `set_adapter` moves no data, so switching is free.
    """

    merged = False  # whether the active adapter is merged into the base

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.train(base.training)

    def remove(self, name: str) -> None:
        """Remove an adapter. If it was the active one, none is active."""
        self.check_unmerged("remove")
        self._check_known(name)
        del self.adapters[name]
        self.active = None if self.active == name else self.active

    def set_adapter(self, name: str | None) -> None:
        """Activate an adapter, which alone trains from now on. None activates the base alone."""
        self.check_unmerged("set_adapter")
        if name is not None:
            self._check_known(name)
        self._activate(name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base alone inside a `with` block."""
        active, rows = self.active, self.rows
        self.check_unmerged("disabled")
        self.active = self.rows = None
        try:
            yield
        finally:
            self.active, self.rows = active, rows

    def check_unmerged(self, operation: str) -> None:
        """Raise RuntimeError if an adapter is merged; only forward and unmerge are allowed then."""
        if self.merged:
            raise RuntimeError(
                f"{operation}: adapter {self.active!r} is merged into this layer; unmerge() "
                "comes first"
            )

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the adapter."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, without the adapter."""
        return self.base.bias

    def extra_repr(self) -> str:
        return f"active={self.active!r}" + (", merged" if self.merged else "")

    def _insert(self, name: str, adapter: nn.Module) -> nn.Module:
        """Take over a new adapter, which is activated if it is the first."""
        self.base.requires_grad_(False)
        self.adapters[name] = adapter.train(self.training)
        is_first = self.active is None and len(self.adapters) == 1
        self._activate(name if is_first else self.active)
        return adapter

    def _activate(self, name: str | None) -> None:
        self.active = name
        for adapter_name, adapter in self.adapters.items():
            adapter.requires_grad_(adapter_name == name)

    def _check_new(self, name: str) -> None:
        self.check_unmerged("add")
        check_adapter_name(name)
        if name in self.adapters:
            raise ValueError(f"name is {name!r}, which this layer has already; it must be new")

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            raise ValueError(
                f"name is {name!r}; this layer has {sorted(self.adapters) or 'no adapters'}"
            )

    def _current_rows(self, adapter_ids: Sequence[str | None] | None) -> RowAssignment | None:
        """Return the row assignment of a forward's argument, or else the one of `mixed_batch`."""
        self.check_batch_not_left()
        if adapter_ids is None:
            return self.rows
        for name in set(adapter_ids) - {None}:
            self._check_known(name)
        return self.assign_rows(adapter_ids)
