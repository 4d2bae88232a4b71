"""load_quantized: a transformers checkpoint on disk -> the model with 4-bit layers, never in memory in 16 bits."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.utils import logging

from pyfast._support import checks
from pyfast.formats import file_io, safetensors_file, transformers_weights
from pyfast.formats.errors import CheckpointError
from pyfast.hf.quantizer import METHOD, NF4Config, first_error


def load_quantized(
    directory: str | os.PathLike,
    model_class: type | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    config: NF4Config | None = None,
    strict: bool = True,
    allow_pickle: bool = False,
    **options,
) -> nn.Module:
    """Reads weight after weight, quantizes it to NF4 and lets it go: at most the packed model and
    one layer in memory.

    A checkpoint that is quantized already, by bitsandbytes to 4 bits or here, is read as it is.
    What is missing, unknown or damaged is a CheckpointError.

    Args:
        directory: with config.json and model.safetensors, or shards of it and their index.
        model_class: by default what config.json names; any class of transformers' with
        from_pretrained. dtype: of what stays unquantized: embeddings, norms, biases, the head.
        device: where the model is to be. config: what is quantized and how; by default all linear
        layers but the head. strict: False lets a head that the files lack start anew, and leaves
        out what the model has no place for. allow_pickle: read pytorch_model.bin where there are no
        safetensors; only tensors, but each file whole. options: of from_pretrained, e.g.
        attn_implementation.
    """
    directory = Path(directory)
    checks.one_of("dtype", dtype, checks.FLOATS)
    if config is not None:
        checks.instance("config", config, NF4Config)
    options |= {"dtype": dtype, "device": device, "config": config, "allow_pickle": allow_pickle}
    model, info = load_with_info(directory, model_class, **options)
    if strict:
        _check_complete(directory, info)
    return model


def load_with_info(
    directory: Path,
    model_class: type | None,
    *,
    dtype: torch.dtype,
    allow_pickle: bool,
    device: str | torch.device = "cpu",
    config: NF4Config | None = None,
    labels: dict[int, str] | None = None,
    **options,
) -> tuple[nn.Module, dict]:
    """`load_quantized`, not strict, and what transformers says of missing, unknown and misshapen
    entries.

    With `labels` the model has these.
    """
    paths = transformers_weights.paths(directory, allow_pickle)
    settings = _read_config(directory)
    if labels is not None:
        settings.id2label, settings.label2id = labels, {name: i for i, name in labels.items()}
    architecture = _class_of(directory, settings, model_class)
    before = _quantization(directory, settings)
    if before is None:
        options["quantization_config"] = NF4Config() if config is None else config
    elif config is not None:
        raise ValueError(f"config is given, and {directory} is quantized already; it must be None")
    else:
        settings.quantization_config = before.to_dict()
    if torch.device(device).type != "cpu":
        options["device_map"] = {"": device}
    with ExitStack() as stack:
        tensors = _tensors(paths, stack)
        stack.enter_context(_one_error(directory))
        stack.enter_context(_bar_in_a_terminal())
        model, info = architecture.from_pretrained(
            None,
            config=settings,
            dtype=dtype,
            state_dict=tensors,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    _check_finite(directory, model)
    model.config.name_or_path = str(directory)
    generation = directory / "generation_config.json"
    if model.can_generate() and generation.exists():
        model.generation_config = transformers.GenerationConfig.from_dict(
            file_io.read_json(generation)
        )
    return model, info


def _tensors(paths: list[Path], stack: ExitStack) -> dict:
    """All tensors by name; of safetensors each is read when it is asked for, and mapped at no time."""
    tensors = {}
    for path in paths:
        if path.suffix == ".safetensors":
            file = stack.enter_context(safetensors_file.open_checked(path))
            tensors |= {name: file.get_slice(name) for name in file.offset_keys()}
        else:
            tensors |= file_io.read_pickle(path)
    return tensors


def _read_config(directory: Path) -> transformers.PreTrainedConfig:
    path = directory / "config.json"
    file_io.read_json(path)
    try:
        return transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a config's class can raise anything
        raise CheckpointError(f"{path}: {_first_line(error)}") from None


def _class_of(directory: Path, settings: transformers.PreTrainedConfig, given: type | None) -> type:
    if given is not None:
        if not isinstance(given, type) or not hasattr(given, "from_pretrained"):
            raise TypeError(
                f"model_class is {given!r}; it must be a model's class of transformers, or an AutoModel"
            )
        if issubclass(given, transformers.PreTrainedModel):
            return given
        with torch.device("meta"):  # an AutoModel's choice
            return type(given.from_config(settings))
    name = (settings.architectures or [None])[0]
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise CheckpointError(
            f"{directory / 'config.json'}: architectures is {settings.architectures!r}, which transformers does not "
            "have; model_class must say which it is"
        )
    return found


def _quantization(directory: Path, settings: transformers.PreTrainedConfig) -> NF4Config | None:
    """How the files are quantized already."""
    found = getattr(settings, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    method = found.get("quant_method")
    try:
        if method == METHOD:
            return NF4Config(**found)
        if method == "bitsandbytes" and (found.get("load_in_4bit") or found.get("_load_in_4bit")):
            return _of_bitsandbytes(found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'}: quantization_config: {error}"
        ) from None
    raise CheckpointError(
        f"{directory} is quantized by {method!r}; it must be by bitsandbytes, to 4 bits, or not at all"
    )


def _of_bitsandbytes(found: dict) -> NF4Config:
    nested, quant_type = (
        found.get("bnb_4bit_use_double_quant", False),
        found.get("bnb_4bit_quant_type", "fp4"),
    )
    return NF4Config(nested=nested, quant_type=quant_type, skip=found.get("llm_int8_skip_modules"))


def _check_finite(directory: Path, model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.is_floating_point() and not bool(p.isfinite().all()):
            raise CheckpointError(f"{directory}: {name} holds NaN or infinite values")


def _check_complete(directory: Path, info: dict) -> None:
    for key, found, expected in sorted(info["mismatched_keys"], key=lambda item: item[0]):
        raise CheckpointError(
            f"{directory}: {key} has shape {list(found)}; it must be {list(expected)}"
        )
    for kind, what in (
        ("missing_keys", "is missing"),
        ("unexpected_keys", "has no place in the model"),
    ):
        if info[kind]:
            first, *others = sorted(info[kind])
            more = f", and so {len(others)} others" if others else ""
            raise CheckpointError(
                f"{directory}: {first} {what}{more}; strict=False goes on without"
            )


@contextmanager
def _one_error(directory: Path) -> Iterator[None]:
    """What is wrong with a weight, of which transformers makes a table."""
    errors = []
    token = first_error.set(errors)
    try:
        yield
    except RuntimeError:
        if not errors:
            raise
        raise CheckpointError(f"{directory}: {errors[0]}") from None
    finally:
        first_error.reset(token)


@contextmanager
def _bar_in_a_terminal() -> Iterator[None]:
    """transformers' progress bar, but not in a log file."""
    quiet = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
