"""Reformer checkpoints of transformers (config.json and model.safetensors), both ways."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyfast import files, tensor_file
from pyfast.checkpoint import CheckpointError
from pyfast.reformer_config import ReformerConfig

if TYPE_CHECKING:
    from pyfast.reformer import Reformer

CONFIG, TENSORS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"

_FIELDS = {  # theirs: ours
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "attn_layers": "layers",
    "num_attention_heads": "heads",
    "attention_head_size": "head_dim",
    "feed_forward_size": "hidden",
    "max_position_embeddings": "max_length",
    "axial_pos_shape": "axial_shape",
    "axial_pos_embds_dim": "axial_widths",
    "num_hashes": "n_hashes",
    "num_buckets": "n_buckets",
    "lsh_attn_chunk_length": "lsh_chunk",
    "local_attn_chunk_length": "local_chunk",
    "hash_seed": "hash_seed",
    "hidden_dropout_prob": "dropout",
    "lsh_attention_probs_dropout_prob": "lsh_dropout",
    "local_attention_probs_dropout_prob": "local_dropout",
    "layer_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "pad_token_id": "pad_id",
    "eos_token_id": "end_id",
}
_DEFAULTS = {  # of transformers; a file need not have them
    "vocab_size": 320,
    "hidden_size": 256,
    "attn_layers": ["local", "lsh"] * 3,
    "num_attention_heads": 12,
    "attention_head_size": 64,
    "feed_forward_size": 512,
    "max_position_embeddings": 4096,
    "axial_pos_shape": [64, 64],
    "axial_pos_embds_dim": [64, 192],
    "num_hashes": 1,
    "hidden_dropout_prob": 0.05,
    "lsh_attention_probs_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.05,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_MUST_BE = {  # what it means for a model to be one that `Reformer` can be
    "is_decoder": True,
    "lsh_num_chunks_before": 1,
    "lsh_num_chunks_after": 0,
    "local_num_chunks_before": 1,
    "local_num_chunks_after": 0,
    "tie_word_embeddings": False,
}
_THEIR_DEFAULTS = _MUST_BE | {"is_decoder": False}
_UNUSED = "lm_head.bias"  # transformers has it, and adds it to nothing
_ACTIVATIONS = {  # the first of a kind is written
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def load(directory: str | os.PathLike, allow_pickle: bool = False) -> "Reformer":
    """The model in a directory that transformers wrote: the same logits, for the same hash_seed, in evaluation.

    pytorch_model.bin is a pickle, and read only if that is allowed, without running what is in it.
    """
    from pyfast.reformer import Reformer

    directory = Path(directory)
    config = _read_config(directory / CONFIG)
    path, tensors = _read_tensors(directory, allow_pickle)
    with torch.device("meta"):
        model = Reformer(config)
    names = _names(config)
    wanted = {names[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    state = {}
    for ours, theirs in names.items():
        tensor = tensors.get(theirs)
        if tensor is None:
            raise CheckpointError(f"{path} lacks {theirs}")
        if tensor.numel() != math.prod(wanted[theirs]) or not tensor.is_floating_point():
            found, shape = f"{tensor.dtype} {list(tensor.shape)}", list(wanted[theirs])
            raise CheckpointError(f"{path}: {theirs} is {found}; by {CONFIG} it must be floats of {shape}")
        state[ours] = tensor.reshape(wanted[theirs])
    unknown = sorted(set(tensors) - set(names.values()) - {_UNUSED})
    if unknown:
        raise CheckpointError(f"{path}: {unknown[0]} is not of a Reformer language model")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().eval()


def save(model: "Reformer", directory: str | os.PathLike) -> None:
    """Both files, or if anything fails neither: what was there stays."""
    config = model.config
    if config.tied or config.positions not in ("axial", "learned") or config.preset not in ("trax", "hf"):
        have = f"tied={config.tied}, positions={config.positions!r}, preset={config.preset!r}"
        raise ValueError(f"the model has {have}; for transformers: tied=False, axial or learned, 'trax' or 'hf'")
    fields = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    fields |= _MUST_BE | {
        "architectures": ["ReformerModelWithLMHead"],
        "model_type": "reformer",
        "axial_pos_embds": config.positions == "axial",
        "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation),
        "dtype": str(model.tokens.weight.dtype).removeprefix("torch."),
    }
    names, state = _names(config), model.state_dict()
    tensors = {theirs: _as_theirs(ours, state[ours]) for ours, theirs in names.items()}
    tensors[_UNUSED] = state["head.weight"].new_zeros(config.vocab_size)
    files.write_together(
        {
            Path(directory) / TENSORS: lambda path: tensor_file.write(path, tensors),
            Path(directory) / CONFIG: lambda path: files.write_json(path, fields),
        }
    )


def _as_theirs(name: str, tensor: Tensor) -> Tensor:
    """Axial positions lie along dimensions of their own."""
    return {"positions.rows": tensor[:, None], "positions.columns": tensor[None]}.get(name, tensor)


def _read_config(path: Path) -> ReformerConfig:
    fields = files.read_json(path)
    if fields.get("model_type") != "reformer":
        raise CheckpointError(f"{path}: model_type is {fields.get('model_type')!r}; it must be 'reformer'")
    for name, value in _MUST_BE.items():
        found = fields.get(name, _THEIR_DEFAULTS[name])
        kind = name.partition("_")[0]
        unused = kind in ("lsh", "local") and kind not in fields.get("attn_layers", _DEFAULTS["attn_layers"])
        if found != value and not unused:
            raise CheckpointError(f"{path}: {name} is {found!r}; it must be {value!r}")
    activation = fields.get("hidden_act", "relu")
    if activation not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise CheckpointError(f"{path}: hidden_act is {activation!r}; it must be one of {known}")
    given = {ours: fields.get(theirs, _DEFAULTS.get(theirs)) for theirs, ours in _FIELDS.items()}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    given = {name: value for name, value in given.items() if value is not None}
    axial = fields.get("axial_pos_embds", True)
    if not axial:
        given.pop("axial_shape"), given.pop("axial_widths")
    try:
        config = ReformerConfig(
            **given,
            activation=_ACTIVATIONS[activation],
            positions="axial" if axial else "learned",
            preset="hf",
            tied=False,
        )
    except (ValueError, TypeError) as error:
        ours, _, rest = str(error).partition(" ")
        theirs = next((theirs for theirs, name in _FIELDS.items() if name == ours), ours)
        raise CheckpointError(f"{path}: {theirs} {rest}") from None
    return replace(config, pad_to=math.lcm(*map(config.chunk, config.layers)))


def _read_tensors(directory: Path, allow_pickle: bool) -> tuple[Path, dict[str, Tensor]]:
    path, pickled = directory / TENSORS, directory / PICKLE
    if path.exists() or not pickled.exists():
        return path, tensor_file.read(path)
    if not allow_pickle:
        raise CheckpointError(f"{pickled} is a pickle; to read it say allow_pickle=True, or convert it to {TENSORS}")
    return pickled, files.read_pickle(pickled)


def _names(config: ReformerConfig) -> dict[str, str]:
    """Ours: theirs, of all parameters."""
    names = {"tokens.weight": "reformer.embeddings.word_embeddings.weight"}
    positions = "reformer.embeddings.position_embeddings"
    if config.positions == "axial":
        names |= {"positions.rows": f"{positions}.weights.0", "positions.columns": f"{positions}.weights.1"}
    else:
        names["positions.weight"] = f"{positions}.embedding.weight"
    for i, kind in enumerate(config.layers):
        layer = f"reformer.encoder.layers.{i}"
        for part in ("weight", "bias"):
            names[f"layers.f{i}.norm.{part}"] = f"{layer}.attention.layer_norm.{part}"
        for linear in ("query_key", "value") if kind == "lsh" else ("query", "key", "value"):
            names[f"layers.f{i}.attention.{linear}.weight"] = f"{layer}.attention.self_attention.{linear}.weight"
        names[f"layers.f{i}.attention.out.weight"] = f"{layer}.attention.output.dense.weight"
        ff = f"layers.g{i}.ff"
        theirs = {"norm": "layer_norm", "up": "dense.dense", "down": "output.dense"}
        for module, name in theirs.items():
            for part in ("weight", "bias"):
                names[f"{ff}.{module}.{part}"] = f"{layer}.feed_forward.{name}.{part}"
    for part in ("weight", "bias"):
        names[f"norm.{part}"] = f"reformer.encoder.layer_norm.{part}"
    return names | {"head.weight": "lm_head.decoder.weight"}
