"""Adapter directories: PEFT's for LoRA, the same files for bottleneck adapters and selections.

The field `peft_type` says which of the three it is. PEFT knows only its own and refuses the others.
"""

import dataclasses
import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.adapters import installation, model_state, peft_files, selection
from pyfast.adapters.bottleneck.config import AdapterConfig
from pyfast.adapters.lora.config import LoRAConfig
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.lora.pissa import relative_to_origin
from pyfast.adapters.module_tree import unwrap_model
from pyfast.formats.errors import CheckpointError
from pyfast.nn.linear_layers import is_conv1d

LORA, BOTTLENECK, SELECTION = "LORA", "PYFAST_BOTTLENECK", "PYFAST_SELECTION"
# In a file, the tensors have their own dtypes.
_BOTTLENECK_FIELDS = [f.name for f in dataclasses.fields(AdapterConfig) if f.name != "dtype"]


def save_adapter(model: nn.Module, directory: str | os.PathLike, name: str | None = None) -> None:
    """Write an adapter to a directory, as adapter_config.json and adapter_model.safetensors.

    LoRA adapters are written as PEFT does. After `select`, the selected parameters are written.
    If anything fails, the files that were there before stay.

    Args:
        model: a model with adapters or with a selection.
        directory: where to write; it is made if it does not exist.
        name: the adapter's name, by default that of the active one.

    Raises:
        ValueError: if the model has no such adapter.
        RuntimeError: if an adapter is merged.

    Example:
        >>> import os, tempfile, torch, pyfast
        >>> model = pyfast.add_lora(torch.nn.Sequential(torch.nn.Linear(32, 8)))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     pyfast.save_adapter(model, directory)
        ...     print(sorted(os.listdir(directory)))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    checks.instance("model", model, nn.Module)
    state = model_state.adapter_state(model)
    if state.selected:
        _check_nameless("default" if name is None else name)
        fields, tensors = _selection_content(model, state.selected)
    else:
        name = state.active if name is None else name
        if name is None:
            raise ValueError("model has no active adapter; name says which to save")
        model_state.check_known(model, name)
        model_state.check_unmerged(model, "save_adapter")
        fields, tensors = _adapter_content(model, name, state.configs[name])
    config = getattr(unwrap_model(model), "config", None)
    base_model = getattr(config, "_name_or_path", None) or None
    peft_files.write(directory, {**fields, peft_files.BASE_MODEL_FIELD: base_model}, tensors)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str = "default",
    *,
    trainable: bool = True,
) -> nn.Module:
    """Add an adapter that PEFT or `save_adapter` wrote, in place, and activate it.

    A selection has no name; it is written over the model's own parameters.

    Args:
        model: the model that the adapter was trained for.
        directory: directory with adapter_config.json and the tensors' file.
        name: name of the adapter, new in the model.
        trainable: let the adapter train. Otherwise it does not, until `set_adapter` activates it
            again.

    Returns:
        The model.

    Raises:
        CheckpointError: if something is missing, unknown or of another shape; the model is then
            as it was.
        ValueError: if the name is taken.

    Example:
        >>> import tempfile, torch, pyfast
        >>> model = pyfast.add_lora(torch.nn.Sequential(torch.nn.Linear(32, 8)))
        >>> other = torch.nn.Sequential(torch.nn.Linear(32, 8))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     pyfast.save_adapter(model, directory)
        ...     other = pyfast.load_adapter(other, directory, "german")
        >>> other[0].active
        'german'
    """
    checks.instance("model", model, nn.Module)
    path, fields = peft_files.read_fields(directory)
    peft_type = fields.get("peft_type")
    if peft_type not in (LORA, BOTTLENECK, SELECTION):
        raise CheckpointError(
            f"{path}: peft_type is {peft_type!r}; it must be {LORA!r}, {BOTTLENECK!r} or "
            f"{SELECTION!r}"
        )
    load = _load_selection if peft_type == SELECTION else _load_adapter
    tensors = load(model, path, fields, name)
    for tensor in [] if trainable else tensors:
        tensor.requires_grad_(False)
    return model


# --- adapters ---


def _adapter_content(
    model: nn.Module, name: str, config: model_state.Config
) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields and the tensors of an adapter's files."""
    modules = dict(model_state.walk_original_modules(model))
    layers = {}
    for path, module in model_state.walk_original_modules(model):
        if isinstance(module, config.layer_type) and name in module.adapters:
            layers[path] = module
    tensors = installation.adapter_tensors(model, name)
    if not tensors:
        raise ValueError(f"adapter {name!r} has no tensors: no layer has it any more")
    targets = _shortest_targets(list(layers), list(modules))
    if isinstance(config, AdapterConfig):
        fields = {key: getattr(config, key) for key in _BOTTLENECK_FIELDS}
        fields |= {"targets": targets, "modules_to_save": list(config.modules_to_save)}
        return {"peft_type": BOTTLENECK, **fields}, tensors
    if config.init == "pissa":
        config, tensors = _at_twice_the_rank(config), tensors | _relative_to_origin(layers, name)
    has_conv1d = any(is_conv1d(layer.base) for layer in layers.values())
    return peft_files.lora_fields(config, targets, is_conv1d=has_conv1d), tensors


def _load_adapter(model: nn.Module, path: Path, fields: dict, name: str) -> list[Tensor]:
    """Add the adapter and return its tensors."""
    if fields["peft_type"] == LORA:
        config = peft_files.read_lora_config(path, fields)
    else:
        config = _read_bottleneck_config(path, fields)
    file, tensors = peft_files.read_tensors(path.parent)
    model_state.check_new(model, name)
    try:
        plan = installation.plan(model, name, config)
        installation.check_unique_names(model, plan.targets)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path.parent} does not fit this model: {error}") from None
    needs_conv1d = fields["peft_type"] == LORA and bool(fields.get("fan_in_fan_out"))
    if needs_conv1d and not any(is_conv1d(layer.base) for layer in plan.targets.values()):
        raise CheckpointError(
            f"{path.parent}: fan_in_fan_out is True but no target is a Conv1D; it must be False"
        )
    peft_files.check_tensors(file, tensors, *installation.expected_shapes(plan, config))
    installation.install(model, name, config, plan)
    model_tensors = installation.adapter_tensors(model, name)
    _copy_tensors(tensors, model_tensors)
    installation.switch(model, name)
    return list(model_tensors.values())


def _read_bottleneck_config(path: Path, fields: dict) -> AdapterConfig:
    peft_files.check_fields(path, fields, _BOTTLENECK_FIELDS)
    try:
        return AdapterConfig(**{key: fields[key] for key in _BOTTLENECK_FIELDS})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


# --- selections ---


def _selection_content(
    model: nn.Module, patterns: tuple[str, ...]
) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields and the tensors of a selection's files."""
    parameters = selection.find_parameters(model, patterns)
    fields = {"peft_type": SELECTION, "patterns": list(patterns)}
    return fields, selection.selected_tensors(model, parameters)


def _load_selection(model: nn.Module, path: Path, fields: dict, name: str) -> list[Tensor]:
    """Write the selected parameters over the model's, and return them."""
    _check_nameless(name)
    peft_files.check_fields(path, fields, ["patterns"])
    file, tensors = peft_files.read_tensors(path.parent)
    selection.check_selectable(model)
    try:
        parameters = selection.find_parameters(model, fields["patterns"])
    except ValueError as error:
        raise CheckpointError(f"{path.parent} does not fit this model: {error}") from None
    model_tensors = selection.selected_tensors(model, parameters)
    shapes = {key: tuple(tensor.shape) for key, tensor in model_tensors.items()}
    peft_files.check_tensors(file, tensors, shapes)
    _copy_tensors(tensors, model_tensors)
    selection.begin_selection(model, fields["patterns"], parameters)
    return list(parameters.values())


def _check_nameless(name: str) -> None:
    if name != "default":
        raise ValueError(
            f"name is {name!r}, but a selection has none: it is the model's own parameters; "
            "leave it out"
        )


# --- helpers ---


@torch.no_grad()
def _copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for key, tensor in target.items():
        tensor.copy_(source[key])


def _at_twice_the_rank(config: LoRAConfig) -> LoRAConfig:
    """Return a configuration with the same scaling at twice the rank."""
    factor = math.sqrt(2) if config.rslora else 2
    return dataclasses.replace(
        config,
        init="kaiming",
        r=2 * config.r,
        alpha=factor * config.alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
    )


def _relative_to_origin(layers: dict[str, LoRALinear], name: str) -> dict[str, Tensor]:
    """Return A and B of PiSSA adapters, by key, for the weights that PiSSA began with."""
    tensors = {}
    for path, layer in layers.items():
        a, b = relative_to_origin(layer.adapters[name], layer.origin)
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, b
    return tensors


def _shortest_targets(targets: list[str], modules: list[str]) -> list[str] | str:
    """Return the shortest target_modules that mean these modules and no others.

    These are last parts of names, whole names, or a regular expression.
    """
    for names in ({path.rpartition(".")[2] for path in targets}, set(targets)):
        name_ends = tuple(f".{name}" for name in names)
        matches = {path for path in modules if path in names or path.endswith(name_ends)}
        if matches == set(targets):
            return sorted(names)
    return "|".join(re.escape(path) for path in targets)
