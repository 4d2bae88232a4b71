"""PEFT's adapter directories: adapter_config.json and adapter_model.safetensors (or .bin), both
ways.

A field that changes the maths and is not known here is refused by name; none is ignored.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pyfast.adapters.lora.config import LoRAConfig
from pyfast.formats import file_io, safetensors_file
from pyfast.formats.errors import CheckpointError

PREFIX = "base_model.model."  # of every tensor's name
CONFIG, TENSORS, OLD_TENSORS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

_FIELDS = {  # PEFT's name: ours
    "r": "r",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "lora_dropout": "dropout",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "lora_bias": "lora_bias",
    "bias": "bias",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "task_type": "task_type",
}
_PEFT_DEFAULTS = {"r": 8, "alpha": 8}  # the others are ours
_DESCRIPTIVE = {  # that say nothing about what the adapter computes, given the rest
    *(
        "peft_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *(
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
    ),
    *("megatron_core", "qalora_group_size", "fan_in_fan_out"),
}
# How A and B start does not matter once they are read, unless that start was taken out of the base.
_HARMLESS_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_fields(directory: str | os.PathLike) -> tuple[Path, dict]:
    """adapter_config.json's fields, and the file they are from."""
    path = Path(directory) / CONFIG
    return path, file_io.read_json(path)


def lora_config(path: Path, fields: dict) -> LoRAConfig:
    """The configuration that the fields describe."""
    _check_fields(path, fields)
    given = {
        ours: fields[theirs] for theirs, ours in _FIELDS.items() if fields.get(theirs) is not None
    }
    if "targets" not in given:
        raise CheckpointError(f"{path}: target_modules is missing; it must name the layers")
    try:
        return LoRAConfig(**{**_PEFT_DEFAULTS, **given})
    except (ValueError, TypeError) as error:
        ours, _, rest = str(error).partition(" ")
        theirs = next((theirs for theirs, name in _FIELDS.items() if name == ours), ours)
        raise CheckpointError(f"{path}: {theirs} {rest}") from None


def _check_fields(path: Path, fields: dict) -> None:
    """No field but those we know, or know to be without effect."""
    init = fields.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {init!r}, which changes the base or the training; it must be one of "
            f"{', '.join(map(repr, _HARMLESS_INITS[1:]))} (PEFT's path_initial_model_for_weight_conversion converts)"
        )
    for name in sorted(set(fields) - set(_FIELDS) - _DESCRIPTIVE):
        if fields[name] not in (None, False, [], {}, ""):
            raise CheckpointError(
                f"{path}: {name} is {fields[name]!r}; it must be unset: it changes what is computed"
            )


def read_tensors(directory: str | os.PathLike) -> tuple[Path, dict[str, Tensor]]:
    """The adapter's tensors by their names without the prefix, and the file they are from."""
    path, old = Path(directory) / TENSORS, Path(directory) / OLD_TENSORS
    if not path.exists() and old.exists():
        path = old
    tensors = safetensors_file.read(path) if path != old else file_io.read_pickle(old)
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(
                f"{path}: {name} is not of this adapter; it must begin with {PREFIX}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values")
    return path, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def lora_fields(config: LoRAConfig, targets: list[str] | str, *, conv1d: bool) -> dict:
    """adapter_config.json's fields, as PEFT writes them."""
    fields = {theirs: _plain(getattr(config, ours)) for theirs, ours in _FIELDS.items()}
    fields |= {
        "target_modules": targets,
        "exclude_modules": fields["exclude_modules"] or None,
        "modules_to_save": fields["modules_to_save"] or None,
        "peft_type": "LORA",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return fields


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return (
        sorted(value)
        if isinstance(value, set)
        else list(value)
        if isinstance(value, tuple)
        else value
    )


def write(directory: str | os.PathLike, fields: dict, tensors: Mapping[str, Tensor]) -> None:
    """Both files, or if anything fails neither: what was there stays."""
    directory = Path(directory)
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    file_io.write_together(
        {
            directory / TENSORS: lambda path: safetensors_file.write(path, named),
            directory / CONFIG: lambda path: file_io.write_json(path, fields),
        }
    )
