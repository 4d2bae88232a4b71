"""BottleneckLinear: a linear layer with named bottleneck adapters of its output.

y = z + s (act(z Wd^T + bd) Wu^T + bu),   z = x W^T + bias
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.adapters.adapter_host import AdapterHost
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.row_assignment import RowAssignment, assign_rows, run_by_adapter
from pyfast.nn.adapter import Adapter
from pyfast.nn.linear_layers import check_base, compute_device, layer_sizes
from pyfast.nn.nf4_linear import NF4Linear

_FILE_KEYS = {
    "adapter_down.weight": "down_weight",
    "adapter_down.bias": "down_bias",
    "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias",
}


class BottleneckWeights(Adapter):
    """One adapter of one layer."""

    def tensors_by_key(self) -> dict[str, Tensor]:
        """Return the parameters themselves, keyed as in adapter files."""
        return {key: getattr(self, name) for key, name in _FILE_KEYS.items()}


class BottleneckLinear(AdapterHost):
    """A frozen linear layer `base`, followed by the active one of its bottleneck adapters.

    `base` is a linear layer that LoRALinear takes, or a LoRALinear. Its adapters and the
    bottleneck adapters have different names.
    """

    def __init__(self, base: nn.Module) -> None:
        if not isinstance(base, LoRALinear):
            check_base("base", base)
        super().__init__(base)
        self.out_features, self.in_features = layer_sizes(self._linear_base())

    def add(
        self,
        name: str,
        bottleneck: int,
        *,
        activation: str = "relu",
        scaling: float = 1.0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> BottleneckWeights:
        """Add an adapter, which passes z on until it is trained.

        It is activated if it is the layer's first. Only the active adapter trains.

        Args:
            name: any string without dots that is no attribute of nn.ModuleDict.
            bottleneck: number of hidden values.
            activation: activation of the hidden values, as in `pyfast.adapter`.
            scaling: factor of what the adapter adds to z.
            dropout: probability of zeroing an element of the adapter's input, in training.
            dtype: dtype of the parameters: float32 (the default) or the base's dtype.

        Returns:
            The new adapter's parameters.
        """
        self.check_add(name, dtype)
        adapter = BottleneckWeights(
            self.out_features,
            bottleneck,
            activation=activation,
            scaling=scaling,
            dropout=dropout,
            init="lora",
            dtype=self._parameter_dtypes()[0] if dtype is None else dtype,
            device=compute_device(self._linear_base()),
        )
        return self._insert(name, adapter)

    def check_add(self, name: str, dtype: torch.dtype | None) -> None:
        """Raise the error that `add` would raise for these arguments, and change nothing."""
        self._check_new(name)
        if dtype is not None:
            checks.one_of("dtype", dtype, self._parameter_dtypes())

    def forward(self, x: Tensor, adapter_ids: Sequence[str | None] | None = None) -> Tensor:
        """Return y of the active adapter, or of one adapter for each x[i].

        Args:
            x: [..., in_features].
            adapter_ids: name of the adapter of each x[i], None for the base alone.

        Returns:
            [..., out_features], in x's dtype or in autocast's.
        """
        rows = self._current_rows(adapter_ids)
        z = self.base(x)
        if rows is not None:
            return run_by_adapter(z, rows.names, self._apply_adapter)
        return self._apply_adapter(self.active, z)

    def assign_rows(self, names: Sequence[str | None]) -> RowAssignment:
        """Return the assignment of these adapters, one for each row of a batch."""
        names = [name if name in self.adapters else None for name in names]
        return assign_rows(names, list(self.adapters), None)

    def _apply_adapter(self, name: str | None, z: Tensor) -> Tensor:
        return z if name is None else self.adapters[name](z)

    def _linear_base(self) -> nn.Module:
        """Return the base without LoRA adapters."""
        return self.base.base if isinstance(self.base, LoRALinear) else self.base

    def _parameter_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that the parameters can have, the default first."""
        linear = self._linear_base()
        dtype = linear.dtype if isinstance(linear, NF4Linear) else linear.weight.dtype
        return [dtype] if dtype == torch.float64 else list(dict.fromkeys((torch.float32, dtype)))
