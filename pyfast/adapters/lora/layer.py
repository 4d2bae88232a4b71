"""LoRALinear: a linear layer, dense or NF4, and its named low-rank adapters.

y = g (x W^T + s (drop(x) A^T B^T + lora_bias)) + bias        g = 1, or DoRA's magnitude / ||W + s B A||
"""

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.adapters.adapted_layer import AdaptedLayer
from pyfast.adapters.lora.mixed import mixed_sum
from pyfast.adapters.lora.shared_input import SharedInput
from pyfast.adapters.lora.weights import INITS, LoRAWeights, precise
from pyfast.adapters.mixed_batch import Rows, rows_of
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.nn.linear_layers import check_base, device_of, hooks_of, is_conv1d, linear_of, sizes_of
from pyfast.nn.nf4_linear import NF4Linear
from pyfast.ops import lora, lora_arguments
from pyfast.ops.nf4 import nf4_dequantize, nf4_quantize

MERGED_INTO = ("16bit", "nf4")


class LoRALinear(AdaptedLayer):
    """A frozen linear layer `base` with adapters by name, of which one, or none, is active.

    `base` is an nn.Linear, an NF4Linear or transformers' Conv1D.
    """

    def __init__(self, base: nn.Module) -> None:
        check_base("base", base)
        super().__init__(base)
        if is_conv1d(base):  # as an nn.Linear's in memory, or it would be copied at every call
            base.weight.data = base.weight.data.t().contiguous().t()
        self.out_features, self.in_features = sizes_of(base)
        self.origin: LoRAWeights | None = (
            None  # W = base + s B A, since PiSSA took that out of the base
        )
        self.shared: SharedInput | None = None  # with the layers that are called on the same x
        self._unmerged: list[
            nn.Module
        ] = []  # the base without what is merged; a list hides it from state_dict
        self._squares: tuple[tuple, Tensor] | None = None  # ||W||^2 of each row, and of which W

    # --- adapters ---

    @precise
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
        """A new adapter, active if it is the first; its output is zero until trained, and only the
        active one trains.

        Args:
            name: any but a module's own attribute. r: the rank. alpha: scaling = alpha / r, or with
            `rslora` alpha / sqrt(r). dropout: of the adapter's input, in training. dora: train a
            magnitude for each row, W's norm at first. lora_bias: a bias of B's, scaled as B is.
            bias: an own copy of the layer's bias. init: "kaiming" or "gaussian" (A random, B zero),
            "orthogonal" (both random, B A = 0), or "pissa": B A the
                r largest singular directions of W, which leave the base.
            dtype: float32 by default, or the base's.
        """
        self.check_add(name, r, alpha, dropout=dropout, init=init, dtype=dtype)
        r, alpha = int(r), float(alpha)
        scaling = alpha / math.sqrt(r) if rslora else alpha / r
        weight = self._weight()
        device = device_of(self.base)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dtype = wide if dtype is None else dtype
        if init == "pissa":
            a, b = self._take_out(r, scaling, dtype)
        else:
            a, b = (
                t.to(device, dtype)
                for t in INITS[init](self.in_features, self.out_features, r, device)
            )
        with_bias = bias and self.base.bias is not None
        own = LoRAWeights(
            a,
            b,
            scaling,
            dropout,
            lora_bias=torch.zeros(self.out_features, dtype=dtype, device=device)
            if lora_bias
            else None,
            magnitude=lora.dora_norm(self._weight(), a, b, scaling).to(dtype) if dora else None,
            bias=self.base.bias.detach().clone() if with_bias else None,
        )
        return self._put(name, own)

    def check_add(
        self, name: str, r: int, alpha: float, *, dropout=0.0, init="kaiming", dtype=None
    ) -> None:
        """All that `add` could refuse, with nothing changed."""
        self._check_new(name)
        if isinstance(r, bool) or not isinstance(r, Integral) or r < 1:
            raise ValueError(f"r is {r!r}; it must be an integer, 1 or more")
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or not abs(alpha) < 1e38:
            raise ValueError(f"alpha is {alpha!r}; it must be a finite number")
        if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= dropout < 1:
            raise ValueError(
                f"dropout is {dropout!r}; it must be a number from 0 up to, but not including, 1"
            )
        checks.one_of("init", init, (*INITS, "pissa"))
        if dtype is not None:
            checks.one_of("dtype", dtype, dict.fromkeys((torch.float32, self._weight().dtype)))
        if init == "orthogonal" and r % 2:
            raise ValueError(f"r is {r}; orthogonal initialization needs an even one")
        if self.origin is not None:
            raise ValueError(
                f"{next(iter(self.adapters))!r} has changed the base by PiSSA; no adapter fits beside it"
            )
        if init == "pissa":
            self._check_pissa(r, alpha)

    def _check_pissa(self, r: int, alpha: float) -> None:
        if isinstance(self.base, NF4Linear):
            raise ValueError(
                "init is 'pissa', which changes the base, and this one is NF4; quantize afterwards"
            )
        if self.adapters:
            raise ValueError(
                f"init is 'pissa', which changes the base; {sorted(self.adapters)} were made for this one"
            )
        if hooks := hooks_of(self.base):
            raise ValueError(
                f"init is 'pissa', which changes the base, and this one has {hooks}, which would be lost"
            )
        if alpha <= 0:
            raise ValueError(f"alpha is {alpha}; PiSSA's must be positive")
        if not self._weight().is_meta and not bool(self._weight().isfinite().all()):
            raise ValueError(
                "init is 'pissa', and the base holds NaN or infinite values; they must be finite"
            )
        if r > min(self.in_features, self.out_features):
            raise ValueError(
                f"r is {r}; PiSSA takes at most {min(self.in_features, self.out_features)} directions"
            )

    @torch.no_grad()
    def _take_out(self, r: int, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B of the r largest singular directions of W; the base becomes W - s B A."""
        weight = self._weight().detach()
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        root = (s[:r] / scaling).sqrt()
        a, b = (root[:, None] * v[:r]).to(dtype), (u[:, :r] * root).to(dtype)
        rest = torch.addmm(w, b.to(w.dtype), a.to(w.dtype), alpha=-scaling).to(weight.dtype)
        self._set_base(linear_of(rest, self.base.bias))
        self.origin = LoRAWeights(a.clone(), b.clone(), scaling).requires_grad_(False)
        return a, b

    def remove(self, name: str) -> None:
        """Drops an adapter. What PiSSA took out of the base returns, to rounding."""
        self.check_unmerged("remove")
        self._check_known(name)
        self._return_origin()
        super().remove(name)

    def _return_origin(self) -> None:
        if self.origin is not None:
            weight, _ = self._folded(self.origin)
            self._set_base(linear_of(weight.to(self._weight().dtype), self.base.bias))
            self.origin = None

    # --- forward ---

    def forward(self, x: Tensor, adapter_ids: Sequence[str | None] | None = None) -> Tensor:
        """y for the active adapter, or with `adapter_ids` for x[i] and the adapter of that name (None: the base)."""
        rows = self._rows(adapter_ids)
        if rows is not None:
            return self._forward_rows(x, rows)
        own = self._weights_of(self.active)
        if own is None or self.merged:
            return self.base(x)
        if hooks_of(self.base):
            return self._beside_hooks(x, own)
        if self.shared is not None and (y := self.shared.output(self, x)) is not None:
            return y
        return lora.lora_linears(x, [self.projection()], dropout_p=self.dropout_now())[0]

    def projection(self) -> lora_arguments.Projection:
        """What runs, for `lora_linears`."""
        own, weight = self._weights_of(self.active), self._weight()
        return lora_arguments.Projection(
            weight,
            own.lora_a,
            own.lora_b,
            own.scaling,
            self.base.bias if own.bias is None else own.bias,
            own.lora_bias,
            own.magnitude,
            None if own.magnitude is None else self._row_squares(weight),
        )

    def dropout_now(self) -> float:
        """The active adapter's, in training."""
        return self._weights_of(self.active).dropout if self.training else 0.0

    def state_of_output(self) -> tuple:
        """What else than x and the parameters the output depends on."""
        return self.active, self.training, self.merged, self.rows is None

    def can_join(self, x: Tensor, dropout: float) -> bool:
        """Whether another layer may compute this one's output with its own, before anybody asks for it."""
        if (
            self._weights_of(self.active) is None
            or self.merged
            or self.rows is not None
            or self._hooked()
        ):
            return False
        weight = self._weight()
        return (
            self.dropout_now() == dropout
            and weight.shape[1] == x.shape[-1]
            and weight.device == x.device
        )

    def _hooked(self) -> bool:
        """Whether somebody wants to know when it is called."""
        return bool(hooks_of(self) or hooks_of(self.base))

    def _beside_hooks(self, x: Tensor, own: LoRAWeights) -> Tensor:
        """The base's own forward, which somebody has hooked, and beside it the low-rank half."""
        if own.magnitude is not None or own.bias is not None:
            raise RuntimeError(
                f"the base has {hooks_of(self.base)}, past which DoRA and a bias of the adapter's reach"
            )
        y, x = (
            self.base(x),
            nn.functional.dropout(x, own.dropout, self.training).to(own.lora_a.dtype),
        )
        update = nn.functional.linear(
            nn.functional.linear(x, own.lora_a), own.lora_b, own.lora_bias
        )
        return y + (own.scaling * update).to(y.dtype)

    def _weights_of(self, name: str | None) -> LoRAWeights | None:
        return self.origin if name is None else self.adapters[name]

    def _forward_rows(self, x: Tensor, rows: Rows) -> Tensor:
        """Several adapters in one batch."""
        self.check_unmerged("a mixed batch")
        if x.dim() < 2 or len(rows.ids) != x.shape[0]:
            raise ValueError(
                f"adapter_ids has {len(rows.ids)} names; x, of shape {list(x.shape)}, needs one for each x[i]"
            )
        for name in rows.used:
            if self.training and self._weights_of(name).dropout:
                raise ValueError(
                    f"adapter {name!r} has dropout, which a mixed batch has not; call eval() or make it 0"
                )
        if not rows.used:
            return self.base(x)
        if hooks_of(self.base):
            raise RuntimeError(
                f"the base has {hooks_of(self.base)}, past which a mixed batch reaches"
            )
        own = [self._weights_of(name) for name in rows.used]
        return mixed_sum(x, self._weight(), self.base.bias, rows, own, self._row_squares)

    def rows_of(self, names: Sequence[str | None]) -> Rows:
        """These adapters, one for each row of a batch; those that this layer has not are the base."""
        known = [*self.adapters, *([] if self.origin is None else [None])]
        names = [name if name in self.adapters else None for name in names]
        return rows_of(names, known, self._weight().device)

    def _row_squares(self, weight: Tensor | NF4Weight) -> Tensor | None:
        """||W||^2 of each row, computed again when W is another or was written to."""
        first = weight.packed if isinstance(weight, NF4Weight) else weight
        if torch.compiler.is_compiling() or first.requires_grad or first.is_inference():
            return None  # changes, or there is no telling
        key = (first.data_ptr(), first._version, first.dtype, first.device, first.shape)
        if self._squares is None or self._squares[0] != key:
            self._squares = (key, lora.row_squares(weight))
        return self._squares[1]

    # --- merging ---

    @property
    def merged(self) -> bool:
        return bool(self._unmerged)

    def merge(self, into: str = "16bit") -> float:
        """Folds the active adapter into the base, and says what of it was lost: ||stored - (W +
        D)|| / ||D||.

        D is the update, W + D the exact sum; where D is zero, nothing is lost. A dense base keeps
        its dtype; an NF4 base becomes an nn.Linear of the dtype it was quantized from, or with
        into="nf4" is quantized again. The base is put aside, not overwritten: `unmerge` is exact to
        the bit, and until then both are in memory.
        """
        lost = self.fold(into)
        if into == "nf4" and lost:
            warnings.warn(
                f"merging into NF4 lost {lost:.0%} of the update (||error|| / ||update||)",
                stacklevel=2,
            )
        return lost

    @torch.no_grad()
    def fold(self, into: str = "16bit") -> float:
        """`merge` without its warning."""
        self.check_unmerged("merge")
        checks.one_of("into", into, MERGED_INTO)
        nf4 = isinstance(self.base, NF4Linear)
        if into == "nf4" and not nf4:
            raise ValueError(
                f"into is 'nf4' but the base is a {type(self.base).__name__}; it must be an NF4Linear"
            )
        if self.active is None:
            raise ValueError("no adapter is active; set_adapter comes before merge")
        if self._weight().device.type == "meta":
            raise ValueError(
                "the base's weight is offloaded, or has no values; it must be in memory"
            )
        exact, bias = self._folded(self.adapters[self.active])
        update = (exact - self._dense_weight().to(exact.dtype)).norm()
        dtype = self._weight().dtype
        if into == "nf4":
            options = {
                "blocksize": self.base.blocksize,
                "nested": self.base.nested,
                "quant_type": self.base.quant_type,
            }
            stored = nf4_quantize(exact.to(dtype), **options)
            merged = NF4Linear.from_weight(stored, bias)
            stored = nf4_dequantize(stored)
        else:
            stored = exact.to(dtype)
            merged = linear_of(stored, bias)
        error = (stored.to(exact.dtype) - exact).norm()
        self._unmerged = [self.base]
        self._set_base(merged.requires_grad_(False).train(self.training))
        rounding = (
            4 * torch.finfo(exact.dtype).eps * exact.norm()
        )  # all that is left of an adapter not trained
        return (error / update).item() if error and update > rounding else 0.0

    def unmerge(self) -> None:
        """The base as it was, to the bit."""
        if not self.merged:
            raise RuntimeError("nothing is merged into this layer")
        (base,) = self._unmerged
        self._unmerged = []
        self._set_base(base.train(self.training))

    def settle(self) -> nn.Module:
        """The base as it is for good: what is merged stays, and if nothing is, what PiSSA took out returns."""
        if not self.merged:
            self._return_origin()
        self._unmerged, self.origin, self.active = [], None, None
        return self.base

    @precise
    @torch.no_grad()
    def _folded(self, own: LoRAWeights) -> tuple[Tensor, Tensor | None]:
        """g (W + s B A), in float32 at least, and bias + g s lora_bias."""
        w = self._dense_weight()
        wide = torch.promote_types(w.dtype, torch.float32)
        w = torch.addmm(w.to(wide), own.lora_b.to(wide), own.lora_a.to(wide), alpha=own.scaling)
        gain = None if own.magnitude is None else own.magnitude.to(wide) / w.norm(dim=1)
        w = w if gain is None else w.mul_(gain[:, None])
        bias = self.base.bias if own.bias is None else own.bias
        if own.lora_bias is None:
            return w, None if bias is None else bias.detach().clone()
        added = own.lora_bias.to(wide) * own.scaling
        added = added if gain is None else added * gain
        return w, (added if bias is None else added + bias).to(
            added.dtype if bias is None else bias.dtype
        )

    # --- the base ---

    def _weight(self) -> Tensor | NF4Weight:
        """W [out, in], as the ops take it."""
        if isinstance(self.base, NF4Linear):
            return self.base.nf4_weight
        return self.base.weight.t() if is_conv1d(self.base) else self.base.weight

    def _dense_weight(self) -> Tensor:
        weight = self._weight()
        return nf4_dequantize(weight) if isinstance(weight, NF4Weight) else weight.detach()

    def _set_base(self, base: nn.Module) -> None:
        self.base, self._squares = base, None

    # --- what nn.Module asks of its modules ---

    def _apply(self, fn: Callable, recurse: bool = True) -> "LoRALinear":
        self._squares = None
        for module in self._unmerged:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.check_unmerged("state_dict")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args) -> None:
        self.check_unmerged("load_state_dict")
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_squares": None}
