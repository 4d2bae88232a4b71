"""AdaptedLayer: a frozen layer and its adapters by name, of whatever kind."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from pyfast.adapters.mixed_batch import Rows, RowWrapper
from pyfast.adapters.module_names import check_name


class AdaptedLayer(RowWrapper):
    """A frozen layer `base` with adapters by name, of which one, or none, is active.

    `set_adapter` moves nothing: switching is free.
    """

    merged = False  # whether the active adapter is in the base

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.train(base.training)

    def _put(self, name: str, adapter: nn.Module) -> nn.Module:
        """A new adapter, active if it is the first; only the active one trains."""
        self.base.requires_grad_(False)
        self.adapters[name] = adapter.train(self.training)
        self._activate(name if self.active is None and len(self.adapters) == 1 else self.active)
        return adapter

    def _check_new(self, name: str) -> None:
        self.check_unmerged("add")
        check_name(name)
        if name in self.adapters:
            raise ValueError(f"name is {name!r}, which this layer has already; it must be new")

    def remove(self, name: str) -> None:
        """Drops an adapter."""
        self.check_unmerged("remove")
        self._check_known(name)
        del self.adapters[name]
        self.active = None if self.active == name else self.active

    def set_adapter(self, name: str | None) -> None:
        """The adapter that runs, and the only one that trains; None: none."""
        self.check_unmerged("set_adapter")
        if name is not None:
            self._check_known(name)
        self._activate(name)

    def _activate(self, name: str | None) -> None:
        self.active = name
        for other, own in self.adapters.items():
            own.requires_grad_(other == name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone."""
        active, rows = self.active, self.rows
        self.check_unmerged("disabled")
        self.active = self.rows = None
        try:
            yield
        finally:
            self.active, self.rows = active, rows

    def _rows(self, adapter_ids: Sequence[str | None] | None) -> Rows | None:
        """Which adapter is for which row: by the argument, or as `mixed_batch` has it."""
        self.check_rows_left()
        if adapter_ids is None:
            return self.rows
        for name in set(adapter_ids) - {None}:
            self._check_known(name)
        return self.rows_of(adapter_ids)

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            raise ValueError(
                f"name is {name!r}; this layer has {sorted(self.adapters) or 'no adapters'}"
            )

    def check_unmerged(self, what: str) -> None:
        """Nothing but forward and unmerge is for a merged layer."""
        if self.merged:
            raise RuntimeError(
                f"{what}: adapter {self.active!r} is merged into this layer; unmerge() comes first"
            )

    @property
    def weight(self) -> Tensor:
        """The base's, without the adapter."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias

    def extra_repr(self) -> str:
        return f"active={self.active!r}" + (", merged" if self.merged else "")
