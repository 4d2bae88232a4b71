"""LoRA for a whole model: adapters added, switched, merged, counted, saved and loaded."""

import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyfast import _checks, lora_model, peft_files
from pyfast.checkpoint import CheckpointError
from pyfast.lora_config import LoRAConfig, check_all_match
from pyfast.lora_layer import MERGED_INTO, LoRALinear
from pyfast.lora_weights import is_conv1d
from pyfast.mixed_rows import RowWrapper
from pyfast.nf4 import NF4Linear


def add_lora(model: nn.Module, config: LoRAConfig | None = None, name: str = "default") -> nn.Module:
    """Freezes the model and gives its target layers an adapter, which is active and all that trains. In place.

    A second adapter is added the same way, under another name.
    """
    config = LoRAConfig() if config is None else config
    _checks.instance("model", model, nn.Module)
    _checks.instance("config", config, LoRAConfig)
    plan = lora_model.plan(model, name, config)
    check_all_match(config, plan.targets, plan.saved)
    lora_model.install(model, name, config, plan)
    lora_model.switch(model, name)
    return model


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switches to an adapter, or with None to the model as it was. The active one trains, no other does."""
    _check_known(model, name)
    lora_model.check_unmerged(model, "set_adapter")
    lora_model.switch(model, name)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter out of the model; if it was the active one, none is."""
    _check_known(model, name)
    lora_model.check_unmerged(model, "remove_adapter")
    lora_model.remove(model, name)


@contextmanager
def mixed_batch(model: nn.Module, adapter_ids: Sequence[str | None]) -> Iterator[None]:
    """Within it, row i of every batch runs with the adapter of the i-th name; None is the model as it was.

    With checkpoints (activations computed again in the backward), the backward belongs inside it, too. A model that
    torch.compile has compiled is compiled once for each set of adapters in a batch, in whatever order the rows are;
    with modules_to_save, for each order.
    """
    for name in adapter_ids:
        _check_known(model, name)
        if name is not None and lora_model.adapters_of(model).configs[name].bias == "all":
            raise ValueError(f"adapter {name!r} has its own biases all over the model; it cannot share a batch")
    wrappers = [module for _, module in lora_model.parts(model) if isinstance(module, RowWrapper)]
    before, may_train = [module.rows for module in wrappers], torch.is_grad_enabled()
    try:
        for module in wrappers:
            module.rows = module.rows_of(adapter_ids)
        yield
    finally:
        for module, rows in zip(wrappers, before, strict=True):
            module.rows, module.rows_left = rows, module.rows_left or may_train


def merge(model: nn.Module, into: str = "16bit", *, unwrap: bool = False) -> dict[str, float]:
    """Folds the active adapter into the layers; says what of each one's update was lost, as `LoRALinear.merge` does.

    `into` is for NF4 layers: "16bit" makes them dense, "nf4" quantises the sum. With `unwrap` the model becomes a
    plain one, without adapters, for good; otherwise `unmerge` brings all back, to the bit.
    """
    layers = {name: layer for name, layer in lora_model.lora_layers(model).items() if layer.active is not None}
    if not layers:
        raise ValueError("model has no active adapter; add_lora or set_adapter comes before merge")
    lora_model.check_unmerged(model, "merge")
    _checks.one_of("into", into, MERGED_INTO)
    nf4 = [name for name, layer in layers.items() if isinstance(layer.base, NF4Linear)]
    if into == "nf4" and not nf4:
        raise ValueError("into is 'nf4' but no adapted layer is an NF4Linear; it must be '16bit'")
    lost = {}
    for name, layer in layers.items():
        lost[name] = layer.fold(into if name in nf4 else "16bit")
        if unwrap:
            layer.settle()  # here, or both bases of every layer are in memory at the end
    if into == "nf4" and any(lost[name] for name in nf4):
        mean, worst = sum(lost[name] for name in nf4) / len(nf4), max(nf4, key=lost.get)
        which = f"{mean:.0%} of the update on average, {lost[worst]:.0%} in {worst}"
        warnings.warn(f"merging into NF4 lost {which} (||error|| / ||update||)", stacklevel=2)
    if unwrap:
        lora_model.unwrap(model)
    return lost


def unmerge(model: nn.Module) -> None:
    """The model as it was before `merge`, to the bit."""
    merged = [layer for layer in lora_model.lora_layers(model).values() if layer.merged]
    if not merged:
        raise ValueError("nothing is merged into model")
    for layer in merged:
        layer.unmerge()


class Summary(NamedTuple):
    """Numbers of parameters; a 4-bit weight counts as what it stands for."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.3g} %)"


def summary(model: nn.Module) -> Summary:
    """How many parameters the model has, and how many of them train."""
    quantised = [module for module in model.modules() if isinstance(module, NF4Linear)]
    sizes = {id(m.weight): m.out_features * m.in_features for m in quantised}
    scales = {id(p) for m in quantised for key, p in m.named_parameters(recurse=False) if key not in ("weight", "bias")}
    counted = [(sizes.get(id(p), p.numel()), p.requires_grad) for p in model.parameters() if id(p) not in scales]
    return Summary(sum(n for n, trains in counted if trains), sum(n for n, _ in counted))


# --- PEFT's files ---


def save_adapter(model: nn.Module, directory: str | os.PathLike, name: str | None = None) -> None:
    """Writes an adapter, the active one by default, as PEFT does: adapter_config.json, adapter_model.safetensors."""
    known = lora_model.adapters_of(model)
    name = known.active if name is None else name
    if name is None:
        raise ValueError("model has no active adapter; name says which to save")
    _check_known(model, name)
    lora_model.check_unmerged(model, "save_adapter")
    layers = {path: layer for path, layer in lora_model.lora_layers(model).items() if name in layer.adapters}
    tensors = lora_model.entries(model, name)
    if not tensors:
        raise ValueError(f"adapter {name!r} has no tensors: no layer has it any more")
    config = known.configs[name]
    if config.init == "pissa":
        config, tensors = _doubled(config), tensors | _relative_to_origin(layers, name)
    fields = peft_files.config_fields(
        config,
        _names_for(list(layers), [path for path, _ in lora_model.parts(model)]),
        base_model=getattr(getattr(lora_model.inner(model), "config", None), "_name_or_path", None) or None,
        conv1d=any(is_conv1d(layer.base) for layer in layers.values()),
    )
    peft_files.write(directory, fields, tensors)


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, name: str = "default", *, trainable: bool = True
) -> nn.Module:
    """Reads an adapter that PEFT or `save_adapter` wrote, and switches to it. In place.

    With `trainable` False nothing of it trains, until `set_adapter` switches to it again.
    What is missing, unknown or of another shape is a CheckpointError, and the model is then as it was.
    """
    config, conv1d = peft_files.read_config(directory)
    path, tensors = peft_files.read_tensors(directory)
    lora_model.check_new(model, name)
    try:
        plan = lora_model.plan(model, name, config)
        lora_model.check_apart(model, plan.targets)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory} does not fit this model: {error}") from None
    if conv1d and not any(is_conv1d(layer.base) for layer in plan.targets.values()):
        raise CheckpointError(f"{directory}: fan_in_fan_out is True but no target is a Conv1D; it must be False")
    _check_tensors(path, tensors, *lora_model.expected(plan, config))
    lora_model.install(model, name, config, plan)
    with torch.no_grad():
        for key, tensor in lora_model.entries(model, name).items():
            tensor.copy_(tensors[key])
    lora_model.switch(model, name)
    if not trainable:
        for tensor in lora_model.entries(model, name).values():
            tensor.requires_grad_(False)
    return model


def _check_known(model: nn.Module, name: str | None) -> None:
    known = lora_model.adapters_of(model).configs
    if name is not None and name not in known:
        raise ValueError(f"adapter {name!r} is unknown; this model has {sorted(known) or 'no adapters'}")


def _check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple], beside: set[str]) -> None:
    for key, shape in shapes.items():
        if key not in tensors:
            raise CheckpointError(f"{path}: {peft_files.PREFIX}{key} is missing")
        if tuple(tensors[key].shape) != shape:
            found = list(tensors[key].shape)
            raise CheckpointError(f"{path}: {peft_files.PREFIX}{key} has shape {found}; it must be {list(shape)}")
    if unknown := sorted(set(tensors) - set(shapes) - beside):
        raise CheckpointError(f"{path}: {peft_files.PREFIX}{unknown[0]} has no place in this adapter's configuration")


def _doubled(config: LoRAConfig) -> LoRAConfig:
    """The same scaling at twice the rank."""
    factor = math.sqrt(2) if config.rslora else 2
    return replace(
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
        meant = [path for path in everything if path in names or path.endswith(tuple(f".{name}" for name in names))]
        if set(meant) == set(chosen):
            return sorted(names)
    return "|".join(re.escape(path) for path in chosen)
