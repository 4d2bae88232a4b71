"""An adapter's directory: PEFT's for LoRA, one of the same files for bottleneck adapters and for
selections.

Its `peft_type` says which it is; PEFT knows only its own and refuses the others.
"""

import dataclasses
import math
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from pyfast._support import checks
from pyfast.adapters import installation, module_tree, peft_files, selection
from pyfast.adapters.bottleneck.config import AdapterConfig
from pyfast.adapters.lora.config import LoRAConfig
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.formats.errors import CheckpointError
from pyfast.nn.linear_layers import is_conv1d

LORA, BOTTLENECK, SELECTION = KINDS = ("LORA", "PYFAST_BOTTLENECK", "PYFAST_SELECTION")
_BASE_MODEL = "base_model_name_or_path"
_FIELDS = [
    f.name for f in dataclasses.fields(AdapterConfig) if f.name != "dtype"
]  # in a file, tensors have their own


def save_adapter(model: nn.Module, directory: str | os.PathLike, name: str | None = None) -> None:
    """Writes an adapter, the active one by default: adapter_config.json, adapter_model.safetensors;
    LoRA as PEFT does.

    Of a model after `select`, the selected parameters.
    """
    checks.instance("model", model, nn.Module)
    known = installation.adapters_of(model)
    if known.selected:
        _check_nameless("default" if name is None else name)
        fields, tensors = _selection_of(model, known.selected)
    else:
        name = known.active if name is None else name
        if name is None:
            raise ValueError("model has no active adapter; name says which to save")
        installation.check_known(model, name)
        installation.check_unmerged(model, "save_adapter")
        fields, tensors = _adapter_of(model, name, known.configs[name])
    base_model = (
        getattr(getattr(module_tree.inner(model), "config", None), "_name_or_path", None) or None
    )
    peft_files.write(directory, {**fields, _BASE_MODEL: base_model}, tensors)


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, name: str = "default", *, trainable: bool = True
) -> nn.Module:
    """Reads an adapter that PEFT or `save_adapter` wrote, and switches to it. In place.

    With `trainable` False nothing of it trains, until `set_adapter` switches to it again. A
    selection, which has no name, is written over the model's own parameters. What is missing,
    unknown or of another shape is a CheckpointError, and the model is then as it was.
    """
    checks.instance("model", model, nn.Module)
    path, fields = peft_files.read_fields(directory)
    kind = fields.get("peft_type")
    if kind not in KINDS:
        raise CheckpointError(
            f"{path}: peft_type is {kind!r}; it must be {', '.join(map(repr, KINDS[:2]))} or {KINDS[2]!r}"
        )
    if kind == SELECTION:
        found = _load_selection(model, path, fields, name)
    else:
        found = _load_adapter(model, path, fields, name)
    for tensor in [] if trainable else found:
        tensor.requires_grad_(False)
    return model


# --- adapters ---


def _adapter_of(
    model: nn.Module, name: str, config: installation.Config
) -> tuple[dict, dict[str, Tensor]]:
    """What is written of it."""
    layers = {
        p: m
        for p, m in installation.parts(model)
        if isinstance(m, config.layer) and name in m.adapters
    }
    tensors = installation.entries(model, name)
    if not tensors:
        raise ValueError(f"adapter {name!r} has no tensors: no layer has it any more")
    targets = _names_for(list(layers), list(dict(installation.parts(model))))
    if isinstance(config, AdapterConfig):
        fields = {key: getattr(config, key) for key in _FIELDS}
        fields |= {"targets": targets, "modules_to_save": list(config.modules_to_save)}
        return {"peft_type": BOTTLENECK, **fields}, tensors
    if config.init == "pissa":
        config, tensors = _doubled(config), tensors | _relative_to_origin(layers, name)
    conv1d = any(is_conv1d(layer.base) for layer in layers.values())
    return peft_files.lora_fields(config, targets, conv1d=conv1d), tensors


def _load_adapter(model: nn.Module, path: Path, fields: dict, name: str) -> list[Tensor]:
    config = (
        peft_files.lora_config(path, fields)
        if fields["peft_type"] == LORA
        else _bottleneck_config(path, fields)
    )
    file, tensors = peft_files.read_tensors(path.parent)
    installation.check_new(model, name)
    try:
        plan = installation.plan(model, name, config)
        installation.check_apart(model, plan.targets)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path.parent} does not fit this model: {error}") from None
    conv1d = fields["peft_type"] == LORA and bool(fields.get("fan_in_fan_out"))
    if conv1d and not any(is_conv1d(layer.base) for layer in plan.targets.values()):
        raise CheckpointError(
            f"{path.parent}: fan_in_fan_out is True but no target is a Conv1D; it must be False"
        )
    _check_tensors(file, tensors, *installation.expected(plan, config))
    installation.install(model, name, config, plan)
    found = installation.entries(model, name)
    _copy(found, tensors)
    installation.switch(model, name)
    return list(found.values())


def _bottleneck_config(path: Path, fields: dict) -> AdapterConfig:
    _check_fields(path, fields, _FIELDS)
    try:
        return AdapterConfig(**{key: fields[key] for key in _FIELDS})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


# --- selections ---


def _selection_of(model: nn.Module, patterns: tuple[str, ...]) -> tuple[dict, dict[str, Tensor]]:
    tensors = selection.entries(model, selection.chosen(model, patterns))
    return {"peft_type": SELECTION, "patterns": list(patterns)}, tensors


def _load_selection(model: nn.Module, path: Path, fields: dict, name: str) -> list[Tensor]:
    _check_nameless(name)
    _check_fields(path, fields, ["patterns"])
    file, tensors = peft_files.read_tensors(path.parent)
    selection.check_open(model)
    try:
        found = selection.chosen(model, fields["patterns"])
    except ValueError as error:
        raise CheckpointError(f"{path.parent} does not fit this model: {error}") from None
    own = selection.entries(model, found)
    _check_tensors(file, tensors, {key: tuple(tensor.shape) for key, tensor in own.items()})
    _copy(own, tensors)
    selection.begin(model, fields["patterns"], found)
    return list(found.values())


def _check_nameless(name: str) -> None:
    if name != "default":
        raise ValueError(
            f"name is {name!r}, but a selection has none: it is the model's own parameters; leave it out"
        )


# --- what is read ---


def _check_fields(path: Path, fields: dict, known: list[str]) -> None:
    """No field but these, and all of them."""
    if missing := [key for key in known if key not in fields]:
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    if unknown := sorted(set(fields) - {*known, "peft_type", _BASE_MODEL}):
        raise CheckpointError(
            f"{path}: {unknown[0]} is {fields[unknown[0]]!r}; it has no meaning in a {fields['peft_type']}"
        )


def _check_tensors(
    path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple], beside: Collection[str] = ()
) -> None:
    for key, shape in shapes.items():
        if key not in tensors:
            raise CheckpointError(f"{path}: {peft_files.PREFIX}{key} is missing")
        if tuple(tensors[key].shape) != shape:
            found = list(tensors[key].shape)
            raise CheckpointError(
                f"{path}: {peft_files.PREFIX}{key} has shape {found}; it must be {list(shape)}"
            )
    if unknown := sorted(set(tensors) - set(shapes) - set(beside)):
        raise CheckpointError(
            f"{path}: {peft_files.PREFIX}{unknown[0]} has no place in this adapter's configuration"
        )


@torch.no_grad()
def _copy(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for key, tensor in own.items():
        tensor.copy_(tensors[key])


# --- what is written ---


def _doubled(config: LoRAConfig) -> LoRAConfig:
    """The same scaling at twice the rank."""
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
    """A and B for the weight that PiSSA began with: (W - s B0 A0) + s B A = W + s [B, -B0] [A; A0]."""
    found = {}
    for path, layer in layers.items():
        own, start = layer.adapters[name], layer.origin
        found[f"{path}.lora_A.weight"] = torch.cat([own.lora_a, start.lora_a])
        found[f"{path}.lora_B.weight"] = torch.cat([own.lora_b, -start.lora_b], dim=1)
    return found


def _names_for(chosen: list[str], everything: list[str]) -> list[str] | str:
    """The shortest target_modules that mean these and no others: last parts, whole names or a regex."""
    for names in ({path.rpartition(".")[2] for path in chosen}, set(chosen)):
        meant = [
            path
            for path in everything
            if path in names or path.endswith(tuple(f".{name}" for name in names))
        ]
        if set(meant) == set(chosen):
            return sorted(names)
    return "|".join(re.escape(path) for path in chosen)
