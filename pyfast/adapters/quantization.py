"""A model's linear layers in 4 bits, one at a time."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from pyfast._support import checks, config_rules, notices
from pyfast._support.progress import Progress
from pyfast.adapters import installation, module_names, module_tree
from pyfast.nn.linear_layers import (
    ALL_LINEAR,
    BASES,
    HEADS,
    hint_for,
    hooks_of,
    is_conv1d,
    is_linear,
    looks_linear,
)
from pyfast.nn.nf4_linear import NF4Linear
from pyfast.ops.nf4 import check_format, nf4_quantize

LM_HEAD = "lm_head"


def quantize(
    model: nn.Module,
    *,
    targets: str | Sequence[str] = ALL_LINEAR,
    skip: Sequence[str] = (LM_HEAD,),
    blocksize: int = 64,
    nested: bool = True,
    quant_type: str = "nf4",
) -> nn.Module:
    """Makes the model's linear layers NF4Linear, whose weights are frozen. In place; the rest stays
    as it is.

    A dense layer is let go before the next is quantized. What is in 4 bits already stays so.

    Args:
        model: one without adapters. targets: "all-linear" (but the output head, layers that the
        model keeps in float32, and those that share their
            weight), a list of last parts of layers' names, or a regular expression for whole names.
        skip: last parts of names of modules to leave alone, with all that is in them.
        blocksize: as `nf4_quantize`'s, as are the others.
    """
    check_format(blocksize, nested, quant_type)
    options = {"blocksize": blocksize, "nested": nested, "quant_type": quant_type}
    names = _plan(model, targets, skip)
    whole = module_tree.inner(model)
    places = _places(whole, names)
    with Progress("quantize", len(names)) as bar:
        for name in names:
            new = _quantized(name, whole.get_submodule(name), options)
            for parent, child_name in places[name]:
                module_tree.put(parent, child_name, new)
            bar.step(name)
    return model


def _quantized(name: str, layer: nn.Module, options: Mapping) -> NF4Linear:
    weight = layer.weight.t() if is_conv1d(layer) else layer.weight
    try:
        return NF4Linear.from_weight(nf4_quantize(weight, **options), layer.bias).train(
            layer.training
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _plan(model: nn.Module, targets: str | Sequence[str], skip: Sequence[str]) -> list[str]:
    """The layers to quantize, by name, all that could be wrong having been said."""
    checks.instance("model", model, nn.Module)
    if not config_rules.is_regex_or_names(targets):
        raise ValueError(
            f"targets is {targets!r}; it must be 'all-linear', a regex or a list of names"
        )
    if not config_rules.is_names(skip):
        raise ValueError(f"skip is {skip!r}; it must be a list of names")
    module_tree.check_replicas(model)
    if known := sorted(installation.adapters_of(model).configs):
        raise ValueError(f"model has adapters, {known}; quantize comes before them")
    model = module_tree.inner(model)
    modules = dict(model.named_modules())
    for end in set(skip) - {LM_HEAD}:
        if not any(module_names.is_named(name, [end]) for name in modules):
            raise ValueError(f"skip holds {end!r}, which matches no module")
    modules = {name: module for name, module in modules.items() if name and not _inside(name, skip)}
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        chosen = _all_linear(model, modules)
    else:
        if isinstance(targets, str):
            module_names.check_regex("targets", targets)
        chosen = {
            name: module for name, module in modules.items() if module_names.is_named(name, targets)
        }
    if not chosen:
        raise ValueError(f"targets {targets!r} match no layer that is not to be skipped")
    shared = _shared(model)
    for name, module in chosen.items():
        _check_layer(name, module, shared)
    return [name for name, module in chosen.items() if not isinstance(module, NF4Linear)]


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that "all-linear" means."""
    kept = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    kept += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    ask, head = getattr(model, "get_output_embeddings", None), None
    if callable(ask):  # transformers' conventions for heads
        head = ask()
        kept += [end for ends in HEADS.values() for end in ends if hasattr(model, end)]
    found = {n: m for n, m in modules.items() if m is not head and not _inside(n, kept)}
    found = {n: m for n, m in found.items() if is_linear(m) or looks_linear(m)}
    shared = _shared(model)
    if tied := [name for name, module in found.items() if id(module.weight) in shared]:
        notices.warn_once(
            f"{', '.join(tied)}: not quantized, since the weight is another module's, too"
        )
    return {n: m for n, m in found.items() if n not in tied}


def _check_layer(name: str, module: nn.Module, shared: set[int]) -> None:
    if not is_linear(module):
        raise TypeError(
            f"{name} is a {type(module).__name__}; it must be {BASES}, or in skip{hint_for(module)}"
        )
    if isinstance(module, NF4Linear):
        return
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in checks.FLOATS:
        found = "computed from others" if weight is None else str(weight.dtype)
        raise TypeError(
            f"{name}: its weight is {found}; it must be a parameter in float32, bfloat16 or float16"
        )
    if id(weight) in shared:
        raise ValueError(f"{name} shares its weight with another module; it must be in skip")
    if hooks := hooks_of(module):
        raise ValueError(f"{name} has {hooks}, which would be lost; they must be taken off first")
    if (
        weight.numel()
        and not weight.is_meta
        and not bool(torch.stack(weight.detach().aminmax()).isfinite().all())
    ):
        raise ValueError(f"{name}: its weight holds NaN or infinite values; it must be finite")


def _inside(name: str, ends: Iterable[str]) -> bool:
    """Whether a module, or one it is in, is called so."""
    ends, parts = list(ends), name.split(".")
    return any(module_names.is_named(".".join(parts[: i + 1]), ends) for i in range(len(parts)))


def _shared(model: nn.Module) -> set[int]:
    """The parameters, by id, that more than one module has."""
    owners = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    return {key for key, count in owners.items() if count > 1}


def _places(model: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each of the modules is; it may be in several places."""
    called = {id(model.get_submodule(name)): name for name in names}
    places = {name: [] for name in called.values()}
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            if id(child) in called:
                places[called[id(child)]].append((parent, child_name))
    return places
