"""Reformer checkpoints of transformers, read and written: config.json and the weights.

The weights are in model.safetensors or its shards.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyfast._support import checks, notices
from pyfast.formats import file_io, safetensors_file, transformers_weights
from pyfast.formats.errors import CheckpointError
from pyfast.models.reformer.config import ReformerConfig
from pyfast.models.reformer.hf_config import CONFIG, check_config, config_fields, read_config

_BIAS = "lm_head.decoder.bias"  # transformers adds it; the first versions of 5 left it out
_UNUSED_BIAS = "lm_head.bias"  # transformers has it, and adds it to nothing; versions before 5 did
_CONSTANT = re.compile(
    r"reformer\.encoder\.layers\.\d+\.attention\.self_attention\.(self_)?mask_value_float(16|32)"
)


@dataclass(frozen=True)
class ParameterFormat:
    """The name and shape of a parameter, in `Reformer` and in transformers' files."""

    name: str
    hf_name: str
    shape: tuple[int, ...]
    hf_dim: int | None = None  # where transformers' shape has one more dimension, of size 1

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if self.hf_dim is None:
            return self.shape
        return (*self.shape[: self.hf_dim], 1, *self.shape[self.hf_dim :])


def read(
    directory: str | os.PathLike, allow_pickle: bool = False
) -> tuple[ReformerConfig, dict[str, Tensor]]:
    """Read the config and the state dict of a model that transformers saved.

    In evaluation a `Reformer` of these has the same logits, for the same hash_seed.

    Args:
        directory: the folder of config.json and the weights.
        allow_pickle: bool, False by default; read pytorch_model.bin too. This is a pickle; it is
            read without running what is in it.

    Returns:
        The ReformerConfig and the state dict, whose tensors are all of one dtype.

    Raises:
        CheckpointError: a file is missing, damaged or of another model.
    """
    directory = Path(directory)
    config = read_config(directory / CONFIG)
    _check_sizes(directory / CONFIG, config)
    source, tensors = transformers_weights.read(directory, allow_pickle)
    if _BIAS in tensors and bool(tensors[_BIAS].any()):
        config = replace(config, head_bias=True)
    parameters = list_parameters(config)
    _check_tensors(source, tensors, parameters)
    _check_unread(source, tensors, parameters, config.head_bias)
    return config, {p.name: tensors[p.hf_name].reshape(p.shape) for p in parameters}


def _check_sizes(path: Path, config: ReformerConfig) -> None:
    """Check that torch can have tensors of these sizes, in 64 bits."""
    try:
        for parameter in list_parameters(config):
            torch.empty(parameter.shape, device="meta")
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: no model has such sizes: {str(error).splitlines()[0]}"
        ) from None


def _check_tensors(
    source: Path, tensors: Mapping[str, Tensor], parameters: list[ParameterFormat]
) -> None:
    """Check that all parameters are there, with the shapes of the config and one dtype."""
    for parameter in parameters:
        if parameter.hf_name not in tensors:
            raise CheckpointError(f"{source} lacks {parameter.hf_name}")
    dtype = tensors[parameters[0].hf_name].dtype  # of the word embeddings
    for parameter in parameters:
        tensor, expected = tensors[parameter.hf_name], parameter.hf_shape
        if tuple(tensor.shape) != expected or tensor.dtype not in checks.FLOATS_AND_DOUBLE:
            actual = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(
                f"{source}: {parameter.hf_name} is {actual}; "
                f"by {CONFIG} it must be floats of {list(expected)}"
            )
        if tensor.dtype != dtype:
            raise CheckpointError(
                f"{source}: {parameter.hf_name} is {tensor.dtype}; "
                f"it must be as the word embeddings, {dtype}"
            )


def _check_unread(
    source: Path, tensors: Mapping[str, Tensor], parameters: list[ParameterFormat], has_bias: bool
) -> None:
    """Check that tensors which are not parameters change no logits."""
    for name in sorted(set(tensors) - {parameter.hf_name for parameter in parameters}):
        if name == _UNUSED_BIAS and bool(tensors[name].any()) and not has_bias:
            notices.warn_once(
                f"{source}: the head's bias is left out, as by transformers 5; older ones add it"
            )
        elif name not in (_BIAS, _UNUSED_BIAS) and not _CONSTANT.fullmatch(name):
            raise CheckpointError(f"{source}: {name} is not of a Reformer language model")


def write(
    config: ReformerConfig, state_dict: Mapping[str, Tensor], directory: str | os.PathLike
) -> None:
    """Write config.json and model.safetensors for transformers.

    If anything fails neither file is written, and what was there stays.

    Args:
        config: the model's; `check_config` says which ones can be written.
        state_dict: the model's, all in one dtype.
        directory: the folder; it is made if it is not there.

    Raises:
        ValueError: transformers would compute something else.
        TypeError: the tensors have several dtypes.
    """
    check_config(config)
    embedding = state_dict["tokens.weight"]
    tensors = {}
    for parameter in list_parameters(config):
        tensor = state_dict[parameter.name]
        checks.same_dtype(parameter.name, tensor, "tokens.weight", embedding)
        tensors[parameter.hf_name] = tensor.reshape(parameter.hf_shape)
    for name in (_BIAS, _UNUSED_BIAS):
        tensors.setdefault(name, embedding.new_zeros(config.vocab_size))
    fields = config_fields(config, dtype=str(embedding.dtype).removeprefix("torch."))
    directory = Path(directory)
    file_io.write_together(
        {
            directory / transformers_weights.SAFETENSORS: partial(
                safetensors_file.write, tensors=tensors
            ),
            directory / CONFIG: lambda path: file_io.write_json(path, fields),
        }
    )


def list_parameters(config: ReformerConfig) -> list[ParameterFormat]:
    """Return the parameters of a model of this config, which must not be tied."""
    vocab_size, width = config.vocab_size, config.width
    embedding = "reformer.embeddings.word_embeddings.weight"
    parameters = [ParameterFormat("tokens.weight", embedding, (vocab_size, width))]
    parameters += _list_positions(config)
    for i, layer_type in enumerate(config.layers):
        parameters += _list_attention(config, i, layer_type) + _list_feed_forward(config, i)
    parameters += _list_norm("norm", "reformer.encoder.layer_norm", 2 * width)
    head = ParameterFormat("head.weight", "lm_head.decoder.weight", (vocab_size, 2 * width))
    bias = ParameterFormat("head.bias", _BIAS, (vocab_size,))
    return [*parameters, head, bias] if config.head_bias else [*parameters, head]


def _list_positions(config: ReformerConfig) -> list[ParameterFormat]:
    hf_name = "reformer.embeddings.position_embeddings"
    if config.positions == "axial":
        rows, columns = zip(config.axial_shape, config.axial_widths)
        return [
            ParameterFormat("positions.rows", f"{hf_name}.weights.0", rows, hf_dim=1),
            ParameterFormat("positions.columns", f"{hf_name}.weights.1", columns, hf_dim=0),
        ]
    shape = (config.max_length, config.width)
    return [ParameterFormat("positions.weight", f"{hf_name}.embedding.weight", shape)]


def _list_attention(config: ReformerConfig, layer: int, layer_type: str) -> list[ParameterFormat]:
    name, hf_name = f"layers.f{layer}", f"reformer.encoder.layers.{layer}.attention"
    inner = config.heads * config.head_dim
    parameters = _list_norm(f"{name}.norm", f"{hf_name}.layer_norm", config.width)
    for linear in ("query_key", "value") if layer_type == "lsh" else ("query", "key", "value"):
        parameters.append(
            ParameterFormat(
                f"{name}.attention.{linear}.weight",
                f"{hf_name}.self_attention.{linear}.weight",
                (inner, config.width),
            )
        )
    out = f"{name}.attention.out.weight"
    shape = (config.width, inner)
    return [*parameters, ParameterFormat(out, f"{hf_name}.output.dense.weight", shape)]


def _list_feed_forward(config: ReformerConfig, layer: int) -> list[ParameterFormat]:
    name, hf_name = f"layers.g{layer}.ff", f"reformer.encoder.layers.{layer}.feed_forward"
    width, hidden = config.width, config.hidden
    return [
        *_list_norm(f"{name}.norm", f"{hf_name}.layer_norm", width),
        ParameterFormat(f"{name}.up.weight", f"{hf_name}.dense.dense.weight", (hidden, width)),
        ParameterFormat(f"{name}.up.bias", f"{hf_name}.dense.dense.bias", (hidden,)),
        ParameterFormat(f"{name}.down.weight", f"{hf_name}.output.dense.weight", (width, hidden)),
        ParameterFormat(f"{name}.down.bias", f"{hf_name}.output.dense.bias", (width,)),
    ]


def _list_norm(name: str, hf_name: str, width: int) -> list[ParameterFormat]:
    return [
        ParameterFormat(f"{name}.weight", f"{hf_name}.weight", (width,)),
        ParameterFormat(f"{name}.bias", f"{hf_name}.bias", (width,)),
    ]
