"""Selective fine-tuning: some of a model's own parameters train, chosen by name."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import translate

from torch import Tensor, nn

from pyfast._support import checks, config_rules
from pyfast.adapters.model_state import AdapterState, adapter_state, set_adapter_state
from pyfast.adapters.module_tree import check_accepts_parameters, unwrap_model
from pyfast.adapters.parameter_summary import FOUR_BIT, group_parameters


def select(model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """Freeze the model, in place, but for the parameters that the patterns name.

    Another `select`, and `add_lora` or `add_adapters`, end the selection.

    Args:
        model: a model without adapters.
        patterns: shell-style patterns for whole names, such as "encoder.layer.11.*", "*.bias" or
            "classifier". A pattern that names a module means all its parameters. transformers'
            name of the base model ("bert.") may be left out in front. A tied parameter goes by
            any of its names.

    Returns:
        The model.

    Raises:
        ValueError: if a pattern matches no parameter, or one that cannot train.

    Example:
        >>> import torch, pyfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8))
        >>> model = pyfast.select(model, ["1", "*.bias"])
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.bias', '1.weight', '1.bias']
    """
    checks.instance("model", model, nn.Module)
    check_selectable(model)
    begin_selection(model, patterns, find_parameters(model, patterns))
    return model


def check_selectable(model: nn.Module) -> None:
    """Raise ValueError unless the model can have a selection."""
    check_accepts_parameters(model)
    if names := sorted(adapter_state(model).configs):
        raise ValueError(
            f"model has adapters, {names}; remove_adapter or merge(unwrap=True) comes before a "
            "selection"
        )


def find_parameters(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that the patterns mean, by the first of their names.

    Raise ValueError for a pattern that matches nothing, or a parameter that cannot train.
    """
    if not config_rules.is_names(patterns) or not patterns:
        raise ValueError(f"patterns is {patterns!r}; it must be a list of names, one at least")
    model = unwrap_model(model)
    aliases = {
        name: set(_aliases(model, name))
        for name, _ in model.named_parameters(remove_duplicate=False)
    }
    matches = {pattern: _matching(pattern, aliases) for pattern in patterns}
    if missing := [pattern for pattern, names in matches.items() if not names]:
        raise ValueError(
            f"patterns hold {missing}, which match no parameter{_nearest(missing, aliases)}"
        )
    ids = {id(model.get_parameter(name)) for names in matches.values() for name in names}
    parameters = {name: p for name, p in model.named_parameters() if id(p) in ids}
    _check_trainable(model, parameters)
    return parameters


def begin_selection(
    model: nn.Module, patterns: Sequence[str], parameters: dict[str, nn.Parameter]
) -> None:
    """Let these parameters train, and no others."""
    model.requires_grad_(False)
    for p in parameters.values():
        p.requires_grad_(True)
    set_adapter_state(model, AdapterState(selected=tuple(patterns)))


def selected_tensors(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the tensors of a selection (not copies) by name.

    These are the parameters, and the buffers beside them that training changes.
    """
    tensors, ids = dict(parameters), {id(p) for p in parameters.values()}
    for path, module in unwrap_model(model).named_modules():
        if any(id(p) in ids for p in module.parameters(recurse=False)):
            persistent = set(module._buffers) - module._non_persistent_buffers_set
            for name, buffer in module.named_buffers(path, recurse=False):
                if name.rpartition(".")[2] in persistent:
                    tensors[name] = buffer
    return tensors


def _aliases(model: nn.Module, name: str) -> Iterator[str]:
    """Yield the names of a parameter and of the modules around it.

    Each name comes with transformers' prefix of the base model and without.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    while name:
        yield name
        if name.startswith(prefix):
            yield name.removeprefix(prefix)
        name = name.rpartition(".")[0]


def _matching(pattern: str, aliases: dict[str, set[str]]) -> set[str]:
    matches = re.compile(translate(pattern)).match
    return {name for name, names in aliases.items() if any(map(matches, names))}


def _nearest(patterns: Sequence[str], aliases: dict[str, set[str]]) -> str:
    """Return the end of an error message that names what the user may have meant."""
    known = sorted(set().union(*aliases.values()))
    nearest = {}
    for pattern in patterns:
        nearest |= dict.fromkeys(get_close_matches(pattern, known, cutoff=0.4))
    return f"; the nearest names are {', '.join(nearest)}" if nearest else ""


def _check_trainable(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    groups, _ = group_parameters(model)
    for name, p in parameters.items():
        group = groups.get(id(p), str(p.dtype))
        if group == FOUR_BIT or not p.is_floating_point():
            raise ValueError(
                f"patterns take in {name}, which is {group} and cannot train; they must leave it "
                "out"
            )
