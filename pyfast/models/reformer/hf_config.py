"""The config.json of a Reformer checkpoint of transformers, read and written."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pyfast.formats import file_io
from pyfast.formats.errors import CheckpointError
from pyfast.models.reformer.config import ATTENTIONS, POSITIONS, ReformerConfig
from pyfast.reference import lsh_options

CONFIG = "config.json"

_FIELDS = {  # transformers' name: name in ReformerConfig
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
_REQUIRED = {  # the only values that `Reformer` can compute with
    "is_decoder": True,
    "lsh_num_chunks_before": 1,
    "lsh_num_chunks_after": 0,
    "local_num_chunks_before": 1,
    "local_num_chunks_after": 0,
    "tie_word_embeddings": False,
}
_DEFAULTS = _REQUIRED | {  # transformers' defaults, for fields that a file lacks
    "is_decoder": False,
    "hidden_act": "relu",
    "axial_pos_embds": True,
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
_NULLABLE = ("num_buckets", "hash_seed", "pad_token_id", "eos_token_id")
_ACTIVATIONS = {  # of several names for one function, the first is written
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def read_config(path: Path) -> ReformerConfig:
    """Return the config of a file, or raise CheckpointError if `Reformer` cannot have it."""
    fields = file_io.read_json(path)
    if fields.get("model_type") != "reformer":
        raise CheckpointError(
            f"{path}: model_type is {fields.get('model_type')!r}; it must be 'reformer'"
        )
    fields = _drop_absent_layers(_DEFAULTS | fields)
    for name, value in _REQUIRED.items():
        if name in fields and fields[name] != value:
            raise CheckpointError(f"{path}: {name} is {fields[name]!r}; it must be {value!r}")
    activation, is_axial = fields["hidden_act"], fields["axial_pos_embds"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise CheckpointError(f"{path}: hidden_act is {activation!r}; it must be one of {known}")
    if not isinstance(is_axial, bool):
        raise CheckpointError(f"{path}: axial_pos_embds is {is_axial!r}; it must be true or false")
    try:
        config = ReformerConfig(
            activation=_ACTIVATIONS[activation],
            positions="axial" if is_axial else "learned",
            preset="hf",
            tied=False,
            **_translate_fields(fields, is_axial),
        )
    except (ValueError, TypeError) as error:
        name, _, rest = str(error).partition(" ")
        hf_names = {pyfast_name: hf_name for hf_name, pyfast_name in _FIELDS.items()}
        raise CheckpointError(f"{path}: {hf_names.get(name, name)} {rest}") from None
    return replace(config, pad_to=_padding_multiple(config))


def _drop_absent_layers(fields: Mapping[str, object]) -> dict[str, object]:
    """Drop the fields of an attention that no layer has."""
    layers = fields["attn_layers"]
    prefixes = []
    for attention in ATTENTIONS:
        if not isinstance(layers, list) or attention not in layers:
            prefixes.append(f"{attention}_")
    return {name: value for name, value in fields.items() if not name.startswith(tuple(prefixes))}


def _translate_fields(fields: Mapping[str, object], is_axial: bool) -> dict[str, object]:
    """Return the arguments of ReformerConfig for the fields that say something."""
    options = {}
    for hf_name, name in _FIELDS.items():
        value = fields.get(hf_name)
        if value is None and hf_name in fields and hf_name not in _NULLABLE:
            raise TypeError(f"{hf_name} is null; it must be given")
        if value is not None and (is_axial or not name.startswith("axial_")):
            options[name] = tuple(value) if isinstance(value, list) else value
    return options


def _padding_multiple(config: ReformerConfig) -> int:
    """Return the number to whose multiples transformers pads the length."""
    return math.lcm(*map(config.chunk, config.layers))


def check_config(config: ReformerConfig) -> None:
    """Raise ValueError unless transformers has a config for the same model.

    With preset "trax" it has one if the rotations are random (no hash_seed), and n_buckets is set
    and factored alike by both.
    """
    allowed = {"tied": (False,), "positions": POSITIONS[:2]}
    if "lsh" in config.layers:
        presets = ("hf", "trax") if _hashes_like_trax(config) else ("hf",)
        allowed |= {"preset": presets, "pad_to": (_padding_multiple(config),)}
    wrong = [name for name, values in allowed.items() if getattr(config, name) not in values]
    if wrong:
        have = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        need = ", ".join(f"{name}={' or '.join(map(repr, allowed[name]))}" for name in wrong)
        raise ValueError(f"the model has {have}; for transformers it must have {need}")


def _hashes_like_trax(config: ReformerConfig) -> bool:
    if config.n_buckets is None or config.hash_seed is not None:
        return False
    factors = {lsh_options.factors(config.n_buckets, rule, 0, 1) for rule in ("trax", "hf")}
    return len(factors) == 1


def config_fields(config: ReformerConfig, dtype: str) -> dict[str, object]:
    """Return the fields of config.json for a model of this dtype."""
    fields = {hf_name: getattr(config, name) for hf_name, name in _FIELDS.items()}
    hf_activations = [hf for hf, name in _ACTIVATIONS.items() if name == config.activation]
    return (
        fields
        | _REQUIRED
        | {
            "architectures": ["ReformerModelWithLMHead"],
            "model_type": "reformer",
            "axial_pos_embds": config.positions == "axial",
            "hidden_act": hf_activations[0],
            "dtype": dtype,
        }
    )
