"""Merging: folding an adapter's update into the weight of its base."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast._support.dtypes import sum_dtype
from pyfast.adapters.adapter_host import AdapterHost
from pyfast.adapters.lora.weights import LoRAWeights, without_autocast
from pyfast.nn.linear_layers import compute_device, dense_weight, layer_weight, make_linear
from pyfast.nn.nf4_linear import NF4Linear
from pyfast.ops.nf4 import nf4_dequantize, nf4_quantize

MERGE_FORMATS = ("16bit", "nf4")


def check_merge(base: nn.Module, active: str | None, into: str) -> None:
    """Raise ValueError unless the active adapter can be merged into the base in this format."""
    checks.one_of("into", into, MERGE_FORMATS)
    if into == "nf4" and not isinstance(base, NF4Linear):
        raise ValueError(
            f"into is 'nf4' but the base is a {type(base).__name__}; it must be an NF4Linear"
        )
    if active is None:
        raise ValueError("no adapter is active; set_adapter comes before merge")
    if layer_weight(base).device.type == "meta":
        raise ValueError("the base's weight is offloaded, or has no values; it must be in memory")


@torch.no_grad()
def fold_adapter(base: nn.Module, adapter: LoRAWeights) -> tuple[Tensor, Tensor | None]:
    """Return g (W + s B A), at least in float32, and bias + g s lora_bias."""
    with without_autocast(compute_device(base)):
        w = dense_weight(base)
        dtype = sum_dtype(w)
        a, b = adapter.lora_a.to(dtype), adapter.lora_b.to(dtype)
        w = torch.addmm(w.to(dtype), b, a, alpha=adapter.scaling)
        gain = None if adapter.magnitude is None else adapter.magnitude.to(dtype) / w.norm(dim=1)
        w = w if gain is None else w.mul_(gain[:, None])
        bias = base.bias if adapter.bias is None else adapter.bias
        if adapter.lora_bias is None:
            return w, None if bias is None else bias.detach().clone()
        added = adapter.lora_bias.to(dtype) * adapter.scaling
        added = added if gain is None else added * gain
        return w, added if bias is None else (added + bias).to(bias.dtype)


@torch.no_grad()
def make_merged_base(base: nn.Module, adapter: LoRAWeights, into: str) -> tuple[nn.Module, float]:
    """Return a new base with the adapter's update, and the share of the update that was lost.

    The share is ||stored - (W + D)|| / ||D||, where D is the update and W + D the exact sum.
    """
    exact, bias = fold_adapter(base, adapter)
    update = (exact - dense_weight(base).to(exact.dtype)).norm()
    dtype = layer_weight(base).dtype
    if into == "nf4":
        options = {
            "blocksize": base.blocksize,
            "nested": base.nested,
            "quant_type": base.quant_type,
        }
        quantized = nf4_quantize(exact.to(dtype), **options)
        merged = NF4Linear.from_weight(quantized, bias)
        stored = nf4_dequantize(quantized)
    else:
        stored = exact.to(dtype)
        merged = make_linear(stored, bias)
    error = (stored.to(exact.dtype) - exact).norm()
    # An adapter that has not been trained leaves an update of rounding errors alone.
    rounding = 4 * torch.finfo(exact.dtype).eps * exact.norm()
    lost = (error / update).item() if error and update > rounding else 0.0
    return merged.requires_grad_(False), lost


class MergingHost(AdapterHost):
    """An AdapterHost whose active adapter can be merged into its base."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        # The base before a merge; a list hides it from state_dict.
        self._unmerged: list[nn.Module] = []

    @property
    def merged(self) -> bool:
        """Return whether the active adapter is merged into the base."""
        return bool(self._unmerged)

    def merge(self, into: str = "16bit") -> float:
        """Fold the active adapter into the base, and warn of what NF4 loses.

        The base is put aside and not overwritten. So `unmerge` is exact to the bit, and until then
        both bases are in memory.

        Args:
            into: "16bit" keeps the dtype of a dense base, and makes an NF4 base an nn.Linear of
                the dtype that it was quantized from. "nf4" quantizes the sum of an NF4 base.

        Returns:
            The share of the update that was lost: ||stored - (W + D)|| / ||D||. D is the update
            and W + D the exact sum. Where D is zero, nothing is lost.
        """
        lost = self.merge_without_warning(into)
        if into == "nf4" and lost:
            warnings.warn(
                f"merging into NF4 lost {lost:.0%} of the update (||error|| / ||update||)",
                stacklevel=2,
            )
        return lost

    def merge_without_warning(self, into: str = "16bit") -> float:
        """Merge the active adapter, and leave the warning of what is lost to the caller."""
        self.check_unmerged("merge")
        check_merge(self.base, self.active, into)
        merged, lost = make_merged_base(self.base, self.adapters[self.active], into)
        self._unmerged = [self.base]
        self._set_base(merged.train(self.training))
        return lost

    def unmerge(self) -> None:
        """Restore the base as it was before `merge`, to the bit."""
        if not self.merged:
            raise RuntimeError("nothing is merged into this layer")
        (base,) = self._unmerged
        self._unmerged = []
        self._set_base(base.train(self.training))

    def _set_base(self, base: nn.Module) -> None:
        self.base = base

    def _apply(self, fn: Callable, recurse: bool = True) -> "MergingHost":
        for module in self._unmerged:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.check_unmerged("state_dict")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args) -> None:
        self.check_unmerged("load_state_dict")
        super()._load_from_state_dict(*args)
