"""AdapterLinear: a linear layer, and bottleneck adapters of its output by name.

y = z + s (act(z Wd^T + bd) Wu^T + bu),   z = x W^T + bias
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.adapters.adapted_layer import AdaptedLayer
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.mixed_batch import Rows, by_adapter, rows_of
from pyfast.nn.adapter import Adapter
from pyfast.nn.linear_layers import check_base, device_of, sizes_of
from pyfast.nn.nf4_linear import NF4Linear

_KEYS = {
    "adapter_down.weight": "down_weight",
    "adapter_down.bias": "down_bias",
    "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias",
}


class OutputAdapter(Adapter):
    """One adapter of one layer."""

    def entries(self) -> dict[str, Tensor]:
        """The tensors, themselves, by their names in a file."""
        return {key: getattr(self, name) for key, name in _KEYS.items()}


class AdapterLinear(AdaptedLayer):
    """A frozen linear layer `base` followed by one of its bottleneck adapters, or by none.

    `base` is what LoRALinear takes, or a LoRALinear: its adapters and these have different names.
    """

    def __init__(self, base: nn.Module) -> None:
        if not isinstance(base, LoRALinear):
            check_base("base", base)
        super().__init__(base)
        self.out_features, self.in_features = sizes_of(self._linear())

    def add(
        self,
        name: str,
        bottleneck: int,
        *,
        activation: str = "relu",
        scaling: float = 1.0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> OutputAdapter:
        """A new adapter, active if it is the first; it passes on z until trained, and only the
        active one trains.

        Args:
            name: any but a module's own attribute.
            bottleneck: hidden values.
            activation: as `pyfast.adapter`'s.
            scaling: of all but z.
            dropout: of the adapter's input, in training.
            dtype: float32 by default, or the base's.
        """
        self.check_add(name, dtype)
        options = {"activation": activation, "scaling": scaling, "dropout": dropout, "init": "lora"}
        dtype = self._dtypes()[0] if dtype is None else dtype
        own = OutputAdapter(
            self.out_features, bottleneck, dtype=dtype, device=device_of(self._linear()), **options
        )
        return self._put(name, own)

    def check_add(self, name: str, dtype: torch.dtype | None) -> None:
        """What `add` could refuse of these, with nothing changed."""
        self._check_new(name)
        if dtype is not None:
            checks.one_of("dtype", dtype, self._dtypes())

    def _linear(self) -> nn.Module:
        """The layer at the bottom."""
        return self.base.base if isinstance(self.base, LoRALinear) else self.base

    def _dtypes(self) -> list[torch.dtype]:
        """What the parameters can be, the default first."""
        linear = self._linear()
        dtype = linear.dtype if isinstance(linear, NF4Linear) else linear.weight.dtype
        return [dtype] if dtype == torch.float64 else list(dict.fromkeys((torch.float32, dtype)))

    def forward(self, x: Tensor, adapter_ids: Sequence[str | None] | None = None) -> Tensor:
        """y for the active adapter, or with `adapter_ids` for x[i] and the adapter of that name (None: z)."""
        rows = self._rows(adapter_ids)
        z = self.base(x)
        if rows is not None:
            return by_adapter(z, rows.names, self._after)
        return self._after(self.active, z)

    def _after(self, name: str | None, z: Tensor) -> Tensor:
        return z if name is None else self.adapters[name](z)

    def rows_of(self, names: Sequence[str | None]) -> Rows:
        """These adapters, one for each row of a batch."""
        return rows_of(
            [name if name in self.adapters else None for name in names], list(self.adapters), None
        )
