"""LoRALinear: a linear layer, dense or NF4, with named low-rank adapters.

y = g (x W^T + s (drop(x) A^T B^T + lora_bias)) + bias,
where g = 1, or DoRA's magnitude / ||W + s B A||
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyfast.adapters.lora.initialization import INITIALIZERS, check_options, initial_vectors
from pyfast.adapters.lora.merging import MergingHost, fold_adapter
from pyfast.adapters.lora.mixed_linear import check_mixed_batch, mixed_linear
from pyfast.adapters.lora.pissa import check_pissa, split_largest_directions
from pyfast.adapters.lora.shared_input import LayerState, SharedInput, sharing_devices
from pyfast.adapters.lora.weights import LoRAWeights, without_autocast
from pyfast.adapters.row_assignment import RowAssignment, assign_rows
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.nn.linear_layers import (
    check_base,
    compute_device,
    forward_hooks,
    is_conv1d,
    layer_sizes,
    layer_weight,
    make_linear,
)
from pyfast.ops import lora
from pyfast.ops.dora import RowSquaresCache
from pyfast.ops.lora_arguments import Projection


class LoRALinear(MergingHost):
    """A frozen linear layer `base` with named LoRA adapters, of which at most one is active.

    Args:
        base: the layer to adapt: an nn.Linear, an NF4Linear or transformers' Conv1D.

    Raises:
        TypeError: if `base` is another module.

    Example:
        >>> import torch, pyfast
        >>> layer = pyfast.LoRALinear(torch.nn.Linear(32, 16))
        >>> adapter = layer.add("german", r=4, alpha=8)
        >>> layer(torch.randn(2, 32)).shape
        torch.Size([2, 16])
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['adapters.german.lora_a', 'adapters.german.lora_b']
    """

    def __init__(self, base: nn.Module) -> None:
        check_base("base", base)
        super().__init__(base)
        if is_conv1d(base):
            # Laid out in memory as an nn.Linear's weight, or every call would copy it.
            base.weight.data = base.weight.data.t().contiguous().t()
        self.out_features, self.in_features = layer_sizes(base)
        # What PiSSA took out of the base: W = base + s B A.
        self.origin: LoRAWeights | None = None
        self.shared_input: SharedInput | None = None
        self._squares = RowSquaresCache()

    # --- adapters ---

    def add(
        self,
        name: str,
        r: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        lora_bias: bool = False,
        bias: bool = False,
        init: str = "kaiming",
        dtype: torch.dtype | None = None,
    ) -> LoRAWeights:
        """Add an adapter, which changes no output until it is trained.

        It is activated if it is the layer's first. Only the active adapter trains.

        Args:
            name: any string without dots that is no attribute of nn.ModuleDict.
            r: rank of A and B.
            alpha: the scaling is alpha / r.
            dropout: probability of zeroing an element of the adapter's input, in training.
            rslora: use the scaling alpha / sqrt(r).
            dora: train a magnitude for each row, which starts as the norm of W's row.
            lora_bias: train a bias of B, which is scaled as B is.
            bias: train a copy of the layer's bias.
            init: "kaiming" or "gaussian" (A random, B zero), "orthogonal" (both random, B A = 0),
                or "pissa" (B A starts as the r largest singular directions of W, which leave the
                base).
            dtype: dtype of the parameters: float32 (the default) or the base's dtype.

        Returns:
            The new adapter's parameters.
        """
        self.check_add(name, r, alpha, dropout=dropout, init=init, dtype=dtype)
        r, alpha = int(r), float(alpha)
        scaling = alpha / math.sqrt(r) if rslora else alpha / r
        if dtype is None:
            is_double = layer_weight(self.base).dtype == torch.float64
            dtype = torch.float64 if is_double else torch.float32
        with without_autocast(compute_device(self.base)):
            a, b = self._initial_factors(init, r, scaling, dtype)
            vectors = initial_vectors(self.base, a, b, scaling, dora, lora_bias, bias)
        return self._insert(name, LoRAWeights(a, b, scaling, dropout, **vectors))

    def check_add(
        self, name: str, r: int, alpha: float, *, dropout=0.0, init="kaiming", dtype=None
    ) -> None:
        """Raise the error that `add` would raise, and change nothing."""
        self._check_new(name)
        dtypes = dict.fromkeys((torch.float32, layer_weight(self.base).dtype))
        check_options(r, alpha, dropout, init, dtype, dtypes)
        if self.origin is not None:
            raise ValueError(
                f"{next(iter(self.adapters))!r} has changed the base by PiSSA; no adapter fits "
                "beside it"
            )
        if init == "pissa":
            check_pissa(self.base, self.adapters, r, alpha)

    def remove(self, name: str) -> None:
        """Remove an adapter. What PiSSA took out of the base returns, up to rounding."""
        self.check_unmerged("remove")
        self._check_known(name)
        self._restore_origin()
        super().remove(name)

    def _initial_factors(
        self, init: str, r: int, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the first A and B; for PiSSA, also take them out of the base."""
        if init != "pissa":
            device = compute_device(self.base)
            a, b = INITIALIZERS[init](self.in_features, self.out_features, r, device)
            return a.to(device, dtype), b.to(device, dtype)
        weight = layer_weight(self.base).detach()
        a, b, rest = split_largest_directions(weight, r, scaling, dtype)
        self._set_base(make_linear(rest, self.base.bias))
        self.origin = LoRAWeights(a.clone(), b.clone(), scaling).requires_grad_(False)
        return a, b

    def _restore_origin(self) -> None:
        """Put back into the base what PiSSA took out."""
        if self.origin is not None:
            weight, _ = fold_adapter(self.base, self.origin)
            self._set_base(make_linear(weight.to(layer_weight(self.base).dtype), self.base.bias))
            self.origin = None

    # --- forward ---

    def forward(self, x: Tensor, adapter_ids: Sequence[str | None] | None = None) -> Tensor:
        """Return y of the active adapter, or of one adapter for each x[i].

        Args:
            x: [..., in_features].
            adapter_ids: name of the adapter of each x[i], None for the base alone.

        Returns:
            [..., out_features], in x's dtype or in autocast's.
        """
        rows = self._current_rows(adapter_ids)
        if rows is not None:
            return self._forward_rows(x, rows)
        adapter = self._weights_of(self.active)
        if adapter is None or self.merged:
            return self.base(x)
        if forward_hooks(self.base):
            return self._forward_beside_hooks(x, adapter)
        if self.shared_input is not None and (y := self.shared_input.output(self, x)) is not None:
            return y
        return lora.lora_linears(x, [self.projection()], dropout_p=self._current_dropout())[0]

    def assign_rows(self, names: Sequence[str | None]) -> RowAssignment:
        """Return the assignment of these adapters, one for each row of a batch.

        Adapters that this layer does not have are the base alone.
        """
        layer_names = [*self.adapters, *([] if self.origin is None else [None])]
        names = [name if name in self.adapters else None for name in names]
        return assign_rows(names, layer_names, layer_weight(self.base).device)

    def _weights_of(self, name: str | None) -> LoRAWeights | None:
        return self.origin if name is None else self.adapters[name]

    def _current_dropout(self) -> float:
        return self._weights_of(self.active).dropout if self.training else 0.0

    def _forward_beside_hooks(self, x: Tensor, adapter: LoRAWeights) -> Tensor:
        """Call the base, which somebody has hooked, and add the low-rank update to its output."""
        if adapter.magnitude is not None or adapter.bias is not None:
            raise RuntimeError(
                f"the base has {forward_hooks(self.base)}, past which DoRA and a bias of the "
                "adapter's reach"
            )
        y = self.base(x)
        return y + adapter.update(x, self._current_dropout()).to(y.dtype)

    def _forward_rows(self, x: Tensor, rows: RowAssignment) -> Tensor:
        """Return y where each x[i] has its own adapter."""
        self.check_unmerged("a mixed batch")
        adapters = {name: self._weights_of(name) for name in rows.used}
        check_mixed_batch(x, rows, adapters if self.training else {})
        if not rows.used:
            return self.base(x)
        if forward_hooks(self.base):
            raise RuntimeError(
                f"the base has {forward_hooks(self.base)}, past which a mixed batch reaches"
            )
        weight, adapters = layer_weight(self.base), list(adapters.values())
        return mixed_linear(x, weight, self.base.bias, rows, adapters, self._row_squares)

    def _row_squares(self, weight: Tensor | NF4Weight) -> Tensor | None:
        """Return ||W||^2 of each row, computed again when W is another or was written to."""
        return self._squares.get(weight, self.base.weight)

    # --- sharing the input with other layers, see shared_input.SharingLayer ---

    def can_share(self, x: Tensor) -> bool:
        """Return whether another layer may compute y, before anybody asks for it."""
        if self.merged or self.rows is not None:
            return False
        if self._current_dropout() or forward_hooks(self) or forward_hooks(self.base):
            return False
        weight = self.base._parameters.get("weight")  # None where it is computed from others
        if weight is None or weight.is_inference():
            return False
        return weight.device == x.device and x.shape[-1] == self.in_features

    def projection(self) -> Projection:
        """Return the active adapter and its base, as `lora_linears` takes them."""
        adapter, weight = self._weights_of(self.active), layer_weight(self.base)
        return Projection(
            weight,
            adapter.lora_a,
            adapter.lora_b,
            adapter.scaling,
            self.base.bias if adapter.bias is None else adapter.bias,
            adapter.lora_bias,
            adapter.magnitude,
            None if adapter.magnitude is None else self._row_squares(weight),
        )

    def output_state(self) -> LayerState:
        """Return what y depends on, beside x."""
        adapter = self._weights_of(self.active)
        settings = (self.active, adapter.scaling, self._current_dropout(), self.training)
        return LayerState.of(settings, (self.base, adapter))

    # --- the base ---

    def release_base(self) -> nn.Module:
        """Return the base for good.

        What is merged stays in it. If nothing is, what PiSSA took out returns.
        """
        if not self.merged:
            self._restore_origin()
        self._unmerged, self.origin, self.active = [], None, None
        return self.base

    def _set_base(self, base: nn.Module) -> None:
        super()._set_base(base)
        self._squares = RowSquaresCache()

    # --- methods of nn.Module ---

    def extra_repr(self) -> str:
        text, shared_input = super().extra_repr(), self.shared_input
        if shared_input is not None and (partners := shared_input.partners(self)):
            text += f", shares its input with {', '.join(partners)} on {sharing_devices()}"
        return text

    def _apply(self, fn: Callable, recurse: bool = True) -> "LoRALinear":
        self._squares = RowSquaresCache()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        # A copied group of layers joins its own copies.
        return {**self.__dict__, "shared_input": None}
