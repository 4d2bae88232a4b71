"""Selective fine-tuning: some of a model's own parameters train, chosen by name."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import translate

from torch import Tensor, nn

from pyfast._support import checks, config_rules
from pyfast.adapters import installation, module_tree
from pyfast.adapters.parameter_summary import FOUR_BIT, kinds_of


def select(model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """Freezes the model but for the parameters that the patterns name. In place; add_lora and the
    like end it.

    Args:
        model: one without adapters. patterns: shell-style, for whole names: "encoder.layer.11.*",
        "*.bias", "classifier". One that names a module
            means all its parameters. transformers' name of the base model ("bert.") may be left out
            in front; a tied parameter goes by any of its names.
    """
    checks.instance("model", model, nn.Module)
    check_open(model)
    begin(model, patterns, chosen(model, patterns))
    return model


def check_open(model: nn.Module) -> None:
    """Whether the model can have a selection."""
    module_tree.check_replicas(model)
    if known := sorted(installation.adapters_of(model).configs):
        raise ValueError(
            f"model has adapters, {known}; remove_adapter or merge(unwrap=True) comes before a selection"
        )


def chosen(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that patterns mean, by the first of their names, all that could be wrong having been said."""
    if not config_rules.is_names(patterns) or not patterns:
        raise ValueError(f"patterns is {patterns!r}; it must be a list of names, one at least")
    model = module_tree.inner(model)
    names = {
        name: set(_names(model, name)) for name, _ in model.named_parameters(remove_duplicate=False)
    }
    meant = {pattern: _matching(pattern, names) for pattern in patterns}
    if missing := [pattern for pattern, found in meant.items() if not found]:
        raise ValueError(
            f"patterns hold {missing}, which match no parameter{_nearest(missing, names)}"
        )
    ids = {id(model.get_parameter(name)) for found in meant.values() for name in found}
    found = {name: p for name, p in model.named_parameters() if id(p) in ids}
    _check_trainable(model, found)
    return found


def begin(model: nn.Module, patterns: Sequence[str], found: dict[str, nn.Parameter]) -> None:
    """These train, and no others."""
    model.requires_grad_(False)
    for p in found.values():
        p.requires_grad_(True)
    module_tree.inner(model)._pyfast_adapters = installation.Adapters(selected=tuple(patterns))


def entries(model: nn.Module, found: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The tensors of a selection, themselves, by name: parameters, and statistics that training changes with them."""
    tensors, ids = dict(found), {id(p) for p in found.values()}
    for path, module in module_tree.inner(model).named_modules():
        if any(id(p) in ids for p in module.parameters(recurse=False)):
            kept = set(module._buffers) - module._non_persistent_buffers_set
            buffers = module.named_buffers(path, recurse=False)
            tensors |= {name: buffer for name, buffer in buffers if name.rpartition(".")[2] in kept}
    return tensors


def _names(model: nn.Module, name: str) -> Iterator[str]:
    """What a parameter and the modules around it are called, with the name of the base model and without."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    while name:
        yield name
        if name.startswith(prefix):
            yield name.removeprefix(prefix)
        name = name.rpartition(".")[0]


def _matching(pattern: str, names: dict[str, set[str]]) -> set[str]:
    matches = re.compile(translate(pattern)).match
    return {name for name, called in names.items() if any(map(matches, called))}


def _nearest(patterns: Sequence[str], names: dict[str, set[str]]) -> str:
    known = sorted(set().union(*names.values()))
    near = dict.fromkeys(
        name for pattern in patterns for name in get_close_matches(pattern, known, cutoff=0.4)
    )
    return f"; the nearest names are {', '.join(near)}" if near else ""


def _check_trainable(model: nn.Module, found: dict[str, nn.Parameter]) -> None:
    kinds, _ = kinds_of(model)
    for name, p in found.items():
        kind = kinds.get(id(p), str(p.dtype))
        if kind == FOUR_BIT or not p.is_floating_point():
            raise ValueError(
                f"patterns take in {name}, which is {kind} and cannot train; they must leave it out"
            )
