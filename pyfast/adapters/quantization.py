"""Quantizing a model's linear layers to 4 bits, one at a time."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from pyfast._support import checks, config_rules, notices
from pyfast._support.progress import Progress
from pyfast.adapters import module_names, module_tree
from pyfast.adapters.model_state import adapter_state
from pyfast.nn.linear_layers import (
    ALL_LINEAR,
    LINEAR_LAYER_RULE,
    TASK_HEADS,
    conversion_hint,
    forward_hooks,
    is_linear,
    is_linear_like,
    layer_weight,
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
    """Replace the model's linear layers by NF4Linear, in place; their weights are frozen.

    A dense layer is let go before the next is quantized. 4-bit layers stay as they are.

    Args:
        model: a model without adapters.
        targets: the layers to quantize: "all-linear", a list of last parts of layers' names, or a
            regular expression for whole names. "all-linear" leaves out the output head, layers
            that the model keeps in float32, and layers that share their weight.
        skip: last parts of names of modules to leave alone, with all that is in them.
        blocksize: number of weights that share a scale; see `nf4_quantize` for the last three.
        nested: quantize the scales, too.
        quant_type: the 4-bit format.

    Returns:
        The model.

    Raises:
        ValueError: if nothing matches, or a layer's weight cannot be quantized.
        TypeError: if a target is not a linear layer.

    Example:
        >>> import torch, pyfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> model = pyfast.quantize(model, skip=["1"])
        >>> [type(layer).__name__ for layer in model]
        ['NF4Linear', 'Linear']
        >>> model(torch.randn(2, 64)).shape
        torch.Size([2, 8])
    """
    check_format(blocksize, nested, quant_type)
    options = {"blocksize": blocksize, "nested": nested, "quant_type": quant_type}
    names = _find_layers(model, targets, skip)
    places = _find_places(root := module_tree.unwrap_model(model), names)
    with Progress("quantize", len(names)) as bar:
        for name in names:
            layer = _quantized(name, root.get_submodule(name), options)
            for parent, child_name in places[name]:
                module_tree.replace_child(parent, child_name, layer)
            bar.step(name)
    return model


def _quantized(name: str, layer: nn.Module, options: Mapping) -> NF4Linear:
    try:
        weight = nf4_quantize(layer_weight(layer), **options)
        return NF4Linear.from_weight(weight, layer.bias).train(layer.training)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _find_layers(model: nn.Module, targets: str | Sequence[str], skip: Sequence[str]) -> list[str]:
    """Return the names of the layers to quantize; raise any error before anything is changed."""
    checks.instance("model", model, nn.Module)
    if not config_rules.is_regex_or_names(targets):
        raise ValueError(
            f"targets is {targets!r}; it must be 'all-linear', a regex or a list of names"
        )
    if not config_rules.is_names(skip):
        raise ValueError(f"skip is {skip!r}; it must be a list of names")
    module_tree.check_accepts_parameters(model)
    if adapters := sorted(adapter_state(model).configs):
        raise ValueError(f"model has adapters, {adapters}; quantize comes before them")
    model = module_tree.unwrap_model(model)
    modules = dict(model.named_modules())
    for skipped in set(skip) - {LM_HEAD}:
        if not any(module_names.is_named(name, [skipped]) for name in modules):
            raise ValueError(f"skip holds {skipped!r}, which matches no module")
    modules = {
        name: module for name, module in modules.items() if name and not _is_inside(name, skip)
    }
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        layers = _all_linear(model, modules)
    else:
        layers = _named(targets, modules)
    if not layers:
        raise ValueError(f"targets {targets!r} match no layer that is not to be skipped")
    shared = _shared_parameters(model)
    for name, module in layers.items():
        _check_layer(name, module, shared)
    return [name for name, module in layers.items() if not isinstance(module, NF4Linear)]


def _named(targets: str | Sequence[str], modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if isinstance(targets, str):
        module_names.check_regex("targets", targets)
    return {
        name: module for name, module in modules.items() if module_names.is_named(name, targets)
    }


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the layers that "all-linear" means."""
    dense = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    dense += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    get_head, head = getattr(model, "get_output_embeddings", None), None
    if callable(get_head):  # transformers' conventions for heads
        head = get_head()
        dense += [name for names in TASK_HEADS.values() for name in names if hasattr(model, name)]
    shared = _shared_parameters(model)
    layers, tied = {}, []
    for name, module in modules.items():
        if module is head or _is_inside(name, dense):
            continue
        if not is_linear(module) and not is_linear_like(module):
            continue
        if id(module.weight) in shared:
            tied.append(name)
        else:
            layers[name] = module
    if tied:
        notices.warn_once(
            f"{', '.join(tied)}: not quantized, since the weight is another module's, too"
        )
    return layers


def _check_layer(name: str, module: nn.Module, shared: set[int]) -> None:
    if not is_linear(module):
        raise TypeError(
            f"{name} is a {type(module).__name__}; it must be {LINEAR_LAYER_RULE}, or in skip"
            f"{conversion_hint(module)}"
        )
    if isinstance(module, NF4Linear):
        return
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in checks.FLOATS:
        state = "computed from others" if weight is None else str(weight.dtype)
        raise TypeError(
            f"{name}: its weight is {state}; it must be a parameter in float32, bfloat16 or float16"
        )
    if id(weight) in shared:
        raise ValueError(f"{name} shares its weight with another module; it must be in skip")
    if hooks := forward_hooks(module):
        raise ValueError(f"{name} has {hooks}, which would be lost; they must be taken off first")
    if weight.numel() == 0 or weight.is_meta:
        return
    if not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
        raise ValueError(f"{name}: its weight holds NaN or infinite values; it must be finite")


def _is_inside(name: str, name_ends: Iterable[str]) -> bool:
    """Return whether the module, or one that it is in, has one of these names."""
    name_ends, parts = list(name_ends), name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(module_names.is_named(path, name_ends) for path in paths)


def _shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that more than one module has."""
    owners = Counter()
    for module in model.modules():
        owners.update(id(p) for p in module._parameters.values() if p is not None)
    return {parameter_id for parameter_id, count in owners.items() if count > 1}


def _find_places(model: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return the parents of each layer, with its name in them; a layer may be in several places."""
    names_by_id = {id(model.get_submodule(name)): name for name in names}
    places = {name: [] for name in names_by_id.values()}
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            if id(child) in names_by_id:
                places[names_by_id[id(child)]].append((parent, child_name))
    return places
