"""PEFT's adapter directories, read and written: adapter_config.json and adapter_model.safetensors.

The older adapter_model.bin is read, too. A field that changes the maths and is not known here is
refused by name; none is ignored.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from pyfast.adapters.lora.config import LoRAConfig
from pyfast.formats import file_io, safetensors_file
from pyfast.formats.errors import CheckpointError

PREFIX = "base_model.model."  # of every tensor's name
BASE_MODEL_FIELD = "base_model_name_or_path"
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE, OLD_TENSORS_FILE = "adapter_model.safetensors", "adapter_model.bin"

_LORA_FIELDS = {  # PEFT's field: LoRAConfig's
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
_PEFT_DEFAULTS = {"r": 8, "alpha": 8}  # the other defaults are LoRAConfig's
# Fields that say nothing about what the adapter computes, given the others.
_DESCRIPTIVE_FIELDS = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    BASE_MODEL_FIELD,
    "revision",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "fan_in_fan_out",
}
# How A and B start does not matter once they are read, unless that start was taken out of the base.
_HARMLESS_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_fields(directory: str | os.PathLike) -> tuple[Path, dict]:
    """Return the path of adapter_config.json and its fields."""
    path = Path(directory) / CONFIG_FILE
    return path, file_io.read_json(path)


def read_lora_config(path: Path, fields: dict) -> LoRAConfig:
    """Return the configuration that the fields of a LoRA adapter describe."""
    _check_lora_fields(path, fields)
    options = {
        name: fields[peft_name]
        for peft_name, name in _LORA_FIELDS.items()
        if fields.get(peft_name) is not None
    }
    if "targets" not in options:
        raise CheckpointError(f"{path}: target_modules is missing; it must name the layers")
    try:
        return LoRAConfig(**{**_PEFT_DEFAULTS, **options})
    except (ValueError, TypeError) as error:
        option, _, rest = str(error).partition(" ")
        peft_names = {name: peft_name for peft_name, name in _LORA_FIELDS.items()}
        raise CheckpointError(f"{path}: {peft_names.get(option, option)} {rest}") from None


def read_tensors(directory: str | os.PathLike) -> tuple[Path, dict[str, Tensor]]:
    """Return the path of the tensors' file, and the tensors by their names without the prefix."""
    path, old = Path(directory) / TENSORS_FILE, Path(directory) / OLD_TENSORS_FILE
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


def lora_fields(config: LoRAConfig, targets: list[str] | str, *, is_conv1d: bool) -> dict:
    """Return the fields of adapter_config.json as PEFT writes them.

    Options that PEFT does not know, such as `share_inputs`, are left out.
    """
    fields = {
        peft_name: _json_value(getattr(config, name)) for peft_name, name in _LORA_FIELDS.items()
    }
    return fields | {
        "target_modules": targets,
        "exclude_modules": fields["exclude_modules"] or None,
        "modules_to_save": fields["modules_to_save"] or None,
        "peft_type": "LORA",
        "fan_in_fan_out": is_conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def write(directory: str | os.PathLike, fields: dict, tensors: Mapping[str, Tensor]) -> None:
    """Write both files. If anything fails, write neither, and leave what was there before."""
    directory = Path(directory)
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    file_io.write_together(
        {
            directory / TENSORS_FILE: lambda path: safetensors_file.write(path, named),
            directory / CONFIG_FILE: lambda path: file_io.write_json(path, fields),
        }
    )


def check_fields(path: Path, fields: dict, names: Collection[str]) -> None:
    """Raise CheckpointError unless the fields of a file of pyfast's have exactly these names."""
    if missing := [name for name in names if name not in fields]:
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    if unknown := sorted(set(fields) - {*names, "peft_type", BASE_MODEL_FIELD}):
        raise CheckpointError(
            f"{path}: {unknown[0]} is {fields[unknown[0]]!r}; it has no meaning in a "
            f"{fields['peft_type']}"
        )


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple],
    redundant: Collection[str] = (),
) -> None:
    """Raise CheckpointError unless the tensors have these names and shapes.

    Tensors whose names are in `redundant` may be there, too.
    """
    for key, shape in shapes.items():
        if key not in tensors:
            raise CheckpointError(f"{path}: {PREFIX}{key} is missing")
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(
                f"{path}: {PREFIX}{key} has shape {list(tensors[key].shape)}; it must be "
                f"{list(shape)}"
            )
    if unknown := sorted(set(tensors) - set(shapes) - set(redundant)):
        raise CheckpointError(
            f"{path}: {PREFIX}{unknown[0]} has no place in this adapter's configuration"
        )


def _check_lora_fields(path: Path, fields: dict) -> None:
    """Raise CheckpointError for a field that is not known, unless it has no effect."""
    init = fields.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {init!r}, which changes the base or the training; it "
            "must be one of "
            f"{', '.join(map(repr, _HARMLESS_INITS[1:]))} (PEFT's "
            "path_initial_model_for_weight_conversion converts)"
        )
    for name in sorted(set(fields) - set(_LORA_FIELDS) - _DESCRIPTIVE_FIELDS):
        if fields[name] not in (None, False, [], {}, ""):
            raise CheckpointError(
                f"{path}: {name} is {fields[name]!r}; it must be unset: it changes what is computed"
            )


def _json_value(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
