"""Reformer checkpoints of transformers (config.json and model.safetensors, or its shards), both ways."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pyfast._support import checks, notices
from pyfast.formats import file_io, safetensors_file, transformers_weights
from pyfast.formats.errors import CheckpointError
from pyfast.models.reformer.config import ATTENTIONS, POSITIONS, ReformerConfig
from pyfast.models.reformer.model import Reformer
from pyfast.reference import lsh_options

CONFIG = "config.json"

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
_MUST_BE = {  # what it means for a model to be one that `Reformer` can be
    "is_decoder": True,
    "lsh_num_chunks_before": 1,
    "lsh_num_chunks_after": 0,
    "local_num_chunks_before": 1,
    "local_num_chunks_after": 0,
    "tie_word_embeddings": False,
}
_DEFAULTS = _MUST_BE | {  # of transformers; a file need not have them
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
_MAY_BE_NULL = ("num_buckets", "hash_seed", "pad_token_id", "eos_token_id")
_BIAS = "lm_head.decoder.bias"  # transformers adds it; the first versions of 5 left it out
_UNUSED_BIAS = "lm_head.bias"  # transformers has it, and adds it to nothing; versions before 5 did
_CONSTANT = re.compile(
    r"reformer\.encoder\.layers\.\d+\.attention\.self_attention\.(self_)?mask_value_float(16|32)"
)
_ACTIVATIONS = {  # the first of a kind is written
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def load(directory: str | os.PathLike, allow_pickle: bool = False) -> Reformer:
    """The model in a directory that transformers wrote: the same logits, for the same hash_seed, in
    evaluation.

    pytorch_model.bin is a pickle, and read only if that is allowed, without running what is in it.
    """
    directory = Path(directory)
    model = _read_model(directory / CONFIG)
    source, tensors = transformers_weights.read(directory, allow_pickle)
    if _BIAS in tensors and bool(tensors[_BIAS].any()):
        model = _empty(replace(model.config, head_bias=True))
    names = _names(model.config)
    wanted = {
        name: _as_theirs(name, parameter).shape for name, parameter in model.named_parameters()
    }
    if missing := [theirs for theirs in names.values() if theirs not in tensors]:
        raise CheckpointError(f"{source} lacks {missing[0]}")
    dtype = tensors[names["tokens.weight"]].dtype
    for ours, theirs in names.items():
        found = tensors[theirs]
        if found.shape != wanted[ours] or found.dtype not in checks.FLOATS_AND_DOUBLE:
            shapes = f"{found.dtype} {list(found.shape)}; by {CONFIG} it must be floats of {list(wanted[ours])}"
            raise CheckpointError(f"{source}: {theirs} is {shapes}")
        if found.dtype != dtype:
            raise CheckpointError(
                f"{source}: {theirs} is {found.dtype}; it must be as the word embeddings, {dtype}"
            )
    others = {name: tensors[name] for name in sorted(set(tensors) - set(names.values()))}
    _check_others(source, others, model.config.head_bias)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict(
        {ours: tensors[names[ours]].reshape(shapes[ours]) for ours in names}, assign=True
    )
    return model.requires_grad_().eval()


def _check_others(source: Path, tensors: Mapping[str, Tensor], has_bias: bool) -> None:
    """Nothing but what changes no logits."""
    for name, tensor in tensors.items():
        if name == _UNUSED_BIAS and bool(tensor.any()) and not has_bias:
            notices.warn_once(
                f"{source}: the head's bias is left out, as by transformers 5; older ones add it"
            )
        elif name not in (_BIAS, _UNUSED_BIAS) and not _CONSTANT.fullmatch(name):
            raise CheckpointError(f"{source}: {name} is not of a Reformer language model")


def save(model: Reformer, directory: str | os.PathLike) -> None:
    """Both files, or if anything fails neither: what was there stays.

    What transformers would compute otherwise is refused. With preset "trax" it computes the same if
    the rotations are random, there being no hash_seed, and n_buckets, which must be given, are not
    factored otherwise.
    """
    config = model.config
    _check_config(config)
    _check_layers(model)
    fields = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    fields |= _MUST_BE | {
        "architectures": ["ReformerModelWithLMHead"],
        "model_type": "reformer",
        "axial_pos_embds": config.positions == "axial",
        "hidden_act": next(
            theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation
        ),
        "dtype": str(model.tokens.weight.dtype).removeprefix("torch."),
    }
    names, state = _names(config), model.state_dict()
    tensors = {theirs: _as_theirs(ours, state[ours]) for ours, theirs in names.items()}
    for name in (_BIAS, _UNUSED_BIAS):
        tensors.setdefault(name, state["head.weight"].new_zeros(config.vocab_size))
    file_io.write_together(
        {
            Path(directory) / transformers_weights.SAFETENSORS: lambda path: safetensors_file.write(
                path, tensors
            ),
            Path(directory) / CONFIG: lambda path: file_io.write_json(path, fields),
        }
    )


def _check_config(config: ReformerConfig) -> None:
    """It says what a config of transformers can say."""
    must_be = {"tied": (False,), "positions": POSITIONS[:2]}
    if "lsh" in config.layers:
        given = config.n_buckets is not None and config.hash_seed is None
        alike = (
            given
            and len({lsh_options.factors(config.n_buckets, rule, 0, 1) for rule in ("trax", "hf")})
            == 1
        )
        must_be |= {"preset": ("hf", "trax") if alike else ("hf",), "pad_to": (_pad_to(config),)}
    wrong = [name for name, allowed in must_be.items() if getattr(config, name) not in allowed]
    if wrong:
        have = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        need = ", ".join(f"{name}={' or '.join(map(repr, must_be[name]))}" for name in wrong)
        raise ValueError(f"the model has {have}; for transformers it must have {need}")


def _check_layers(model: Reformer) -> None:
    """They are such as a new model has, in one dtype."""
    layers = dict(model.named_modules())
    for name, plain in _empty(model.config).named_modules():
        found = type(layers.get(name))
        if name and found is not type(plain):
            cure = "merge(model, unwrap=True) makes plain layers of adapted ones, and dense ones if they are in 4 bits"
            raise ValueError(
                f"{name} is {found.__name__}; it must be {type(plain).__name__} for transformers: {cure}"
            )
    for name, parameter in model.named_parameters():
        checks.same_dtype(name, parameter, "tokens.weight", model.tokens.weight)


def _as_theirs(name: str, tensor: Tensor) -> Tensor:
    """Axial positions lie along dimensions of their own."""
    return {"positions.rows": tensor[:, None], "positions.columns": tensor[None]}.get(name, tensor)


def _pad_to(config: ReformerConfig) -> int:
    """The lengths that transformers fills up to."""
    return math.lcm(*map(config.chunk, config.layers))


def _empty(config: ReformerConfig) -> Reformer:
    with torch.device("meta"):
        return Reformer(config)


def _read_model(path: Path) -> Reformer:
    """Without data."""
    fields = file_io.read_json(path)
    if fields.get("model_type") != "reformer":
        raise CheckpointError(
            f"{path}: model_type is {fields.get('model_type')!r}; it must be 'reformer'"
        )
    fields = _DEFAULTS | fields
    layers = fields["attn_layers"]
    absent = [
        f"{kind}_" for kind in ATTENTIONS if not isinstance(layers, list) or kind not in layers
    ]
    fields = {name: value for name, value in fields.items() if not name.startswith(tuple(absent))}
    for name, value in _MUST_BE.items():
        if name in fields and fields[name] != value:
            raise CheckpointError(f"{path}: {name} is {fields[name]!r}; it must be {value!r}")
    activation, axial = fields["hidden_act"], fields["axial_pos_embds"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise CheckpointError(f"{path}: hidden_act is {activation!r}; it must be one of {known}")
    if not isinstance(axial, bool):
        raise CheckpointError(f"{path}: axial_pos_embds is {axial!r}; it must be true or false")
    given = {"activation": _ACTIVATIONS[activation], "positions": "axial" if axial else "learned"}
    try:
        config = ReformerConfig(**given, **_given(fields, axial), preset="hf", tied=False)
    except (ValueError, TypeError) as error:
        ours, _, rest = str(error).partition(" ")
        theirs = next((theirs for theirs, name in _FIELDS.items() if name == ours), ours)
        raise CheckpointError(f"{path}: {theirs} {rest}") from None
    try:
        return _empty(replace(config, pad_to=_pad_to(config)))
    except (
        ValueError,
        TypeError,
        RuntimeError,
        OverflowError,
    ) as error:  # torch's, of sizes beyond 64 bits
        raise CheckpointError(
            f"{path}: no model has such sizes: {str(error).splitlines()[0]}"
        ) from None


def _given(fields: Mapping[str, object], axial: bool) -> dict:
    """What is in the file, by our names, but for what says nothing."""
    found = {}
    for theirs, ours in _FIELDS.items():
        value = fields.get(theirs)
        if value is None and theirs in fields and theirs not in _MAY_BE_NULL:
            raise TypeError(f"{theirs} is null; it must be given")
        if value is not None and (axial or not ours.startswith("axial_")):
            found[ours] = tuple(value) if isinstance(value, list) else value
    return found


def _names(config: ReformerConfig) -> dict[str, str]:
    """Ours: theirs, of all parameters."""
    names = {"tokens.weight": "reformer.embeddings.word_embeddings.weight"}
    positions = "reformer.embeddings.position_embeddings"
    if config.positions == "axial":
        names |= {
            "positions.rows": f"{positions}.weights.0",
            "positions.columns": f"{positions}.weights.1",
        }
    else:
        names["positions.weight"] = f"{positions}.embedding.weight"
    for i, kind in enumerate(config.layers):
        layer = f"reformer.encoder.layers.{i}"
        for part in ("weight", "bias"):
            names[f"layers.f{i}.norm.{part}"] = f"{layer}.attention.layer_norm.{part}"
        for linear in ("query_key", "value") if kind == "lsh" else ("query", "key", "value"):
            names[f"layers.f{i}.attention.{linear}.weight"] = (
                f"{layer}.attention.self_attention.{linear}.weight"
            )
        names[f"layers.f{i}.attention.out.weight"] = f"{layer}.attention.output.dense.weight"
        theirs = {"norm": "layer_norm", "up": "dense.dense", "down": "output.dense"}
        for module, name in theirs.items():
            for part in ("weight", "bias"):
                names[f"layers.g{i}.ff.{module}.{part}"] = f"{layer}.feed_forward.{name}.{part}"
    for part in ("weight", "bias"):
        names[f"norm.{part}"] = f"reformer.encoder.layer_norm.{part}"
    return (
        names
        | {"head.weight": "lm_head.decoder.weight"}
        | ({"head.bias": _BIAS} if config.head_bias else {})
    )
