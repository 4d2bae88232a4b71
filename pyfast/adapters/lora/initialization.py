"""Initialization of a LoRA adapter: the first A and B, and what may be asked of them."""

import math
from collections.abc import Collection
from numbers import Integral

import torch
from torch import Tensor, nn

from pyfast._support import checks, config_rules
from pyfast.nn.linear_layers import layer_weight
from pyfast.ops.dora import dora_norm


def check_options(
    r: int, alpha: float, dropout: float, init: str, dtype: torch.dtype | None, dtypes: Collection
) -> None:
    """Raise ValueError unless an adapter can be made with these options.

    `dtypes` are the dtypes that the parameters can have, beside the default, None.
    """
    if isinstance(r, bool) or not isinstance(r, Integral) or r < 1:
        raise ValueError(f"r is {r!r}; it must be an integer, 1 or more")
    if not config_rules.is_number(alpha):
        raise ValueError(f"alpha is {alpha!r}; it must be a finite number")
    checks.probability("dropout", dropout)
    checks.one_of("init", init, INITS)
    if dtype is not None:
        checks.one_of("dtype", dtype, dtypes)
    if init == "orthogonal" and r % 2:
        raise ValueError(f"r is {r}; orthogonal initialization needs an even one")


def initial_vectors(
    base: nn.Module, a: Tensor, b: Tensor, scaling: float, dora: bool, lora_bias: bool, bias: bool
) -> dict[str, Tensor | None]:
    """Return the first lora_bias, magnitude and bias of an adapter, None where it has none.

    The magnitude is the norm of each row of W + s B A, so that the adapter changes nothing.
    """
    vectors = dict.fromkeys(("lora_bias", "magnitude", "bias"))
    if lora_bias:
        vectors["lora_bias"] = b.new_zeros(len(b))
    if dora:
        vectors["magnitude"] = dora_norm(layer_weight(base), a, b, scaling).to(b.dtype)
    if bias and base.bias is not None:
        vectors["bias"] = base.bias.detach().clone()
    return vectors


def _kaiming(in_features: int, out_features: int, r: int, device) -> tuple[Tensor, Tensor]:
    a = nn.init.kaiming_uniform_(torch.empty(r, in_features, device=device), a=math.sqrt(5))
    return a, torch.zeros(out_features, r, device=device)


def _gaussian(in_features: int, out_features: int, r: int, device) -> tuple[Tensor, Tensor]:
    a = torch.randn(r, in_features, device=device) / r
    return a, torch.zeros(out_features, r, device=device)


def _orthogonal(in_features: int, out_features: int, r: int, device) -> tuple[Tensor, Tensor]:
    """Return A and B from orthogonal halves of R^r, so that B A = 0."""
    q = torch.linalg.qr(torch.randn(r, r, device=device))[0]
    a = q[0::2].t() @ torch.randn(r // 2, in_features, device=device)
    b = torch.randn(out_features, r // 2, device=device) @ q[1::2]
    return a / 10, b / 10


INITIALIZERS = {"kaiming": _kaiming, "gaussian": _gaussian, "orthogonal": _orthogonal}
INITS = (*INITIALIZERS, "pissa")
