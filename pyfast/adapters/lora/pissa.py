"""PiSSA: an adapter that starts as the largest singular directions of the weight.

These directions leave the base: W = (W - s B A) + s B A.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pyfast._support.dtypes import sum_dtype
from pyfast.adapters.lora.weights import LoRAWeights
from pyfast.nn.linear_layers import forward_hooks, layer_sizes, layer_weight
from pyfast.nn.nf4_linear import NF4Linear


def check_pissa(base: nn.Module, other_adapters: Collection[str], r: int, alpha: float) -> None:
    """Raise ValueError unless the base of a layer can start an adapter by PiSSA."""
    if isinstance(base, NF4Linear):
        raise ValueError(
            "init is 'pissa', which changes the base, and this one is NF4; quantize afterwards"
        )
    if other_adapters:
        raise ValueError(
            f"init is 'pissa', which changes the base; {sorted(other_adapters)} were made for "
            "this one"
        )
    if hooks := forward_hooks(base):
        raise ValueError(
            f"init is 'pissa', which changes the base, and this one has {hooks}, which would be "
            "lost"
        )
    if alpha <= 0:
        raise ValueError(f"alpha is {alpha}; PiSSA's must be positive")
    weight = layer_weight(base)
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise ValueError(
            "init is 'pissa', and the base holds NaN or infinite values; they must be finite"
        )
    if r > min(layer_sizes(base)):
        raise ValueError(f"r is {r}; PiSSA takes at most {min(layer_sizes(base))} directions")


@torch.no_grad()
def split_largest_directions(
    weight: Tensor, r: int, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and B of the r largest singular directions of W, and the rest W - s B A."""
    w = weight.to(sum_dtype(weight))
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    a, b = (root[:, None] * v[:r]).to(dtype), (u[:, :r] * root).to(dtype)
    rest = torch.addmm(w, b.to(w.dtype), a.to(w.dtype), alpha=-scaling).to(weight.dtype)
    return a, b, rest


def relative_to_origin(adapter: LoRAWeights, origin: LoRAWeights) -> tuple[Tensor, Tensor]:
    """Return A and B, at twice the rank, for the weight that PiSSA began with.

    With A0 and B0 from `origin`: (W - s B0 A0) + s B A = W + s [B, -B0] [A; A0].
    """
    a = torch.cat([adapter.lora_a, origin.lora_a])
    b = torch.cat([adapter.lora_b, -origin.lora_b], dim=1)
    return a, b
