"""load_quantized: read a transformers checkpoint as a model with 4-bit layers.

The model is never in memory in 16 bits.
"""

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
from pyfast.hf.quantizer import METHOD, NF4Config, load_errors


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
    """Load a transformers checkpoint with its linear layers quantized to 4 bits.

    Weights are read one by one; each is quantized, then released. At most the packed model and one
    layer are in memory. A checkpoint that is quantized already, by bitsandbytes to 4 bits or by
    pyfast, is read without change.

    Args:
        directory: a folder with config.json and model.safetensors, or its shards and their index.
        model_class: a class of transformers with from_pretrained, such as AutoModelForCausalLM.
            Default: the class that config.json names.
        dtype: the dtype of everything that is not quantized: embeddings, norms, biases, the head.
        device: where to put the model.
        config: which layers to quantize, and how. Default: all linear layers but the head.
        strict: if False, a head that the files lack is initialized, and entries without a place in
            the model are left out.
        allow_pickle: read pytorch_model.bin if there are no safetensors. Only tensors are read, but
            each file is in memory as a whole.
        options: further arguments of from_pretrained, such as attn_implementation.

    Returns:
        nn.Module: the model in eval mode, with `NF4Linear` layers.

    Raises:
        CheckpointError: if a file is missing or damaged, or does not fit the model.

    Example:
        >>> import tempfile, transformers, pyfast.hf
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=64)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     transformers.GPT2LMHeadModel(config).save_pretrained(directory)
        ...     model = pyfast.hf.load_quantized(directory)
        >>> type(model.transformer.h[0].mlp.c_fc).__name__
        'NF4Linear'
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
    """Return a quantized model, and what transformers says about its entries.

    Entries may be missing, unknown or of another shape. If `labels` are passed, the model's
    configuration gets them.
    """
    paths = transformers_weights.paths(directory, allow_pickle)
    settings = _read_config(directory)
    if labels is not None:
        settings.id2label, settings.label2id = labels, {name: i for i, name in labels.items()}
    architecture = _architecture(directory, settings, model_class)
    file_config = _file_quantization(directory, settings)
    if file_config is None:
        options["quantization_config"] = NF4Config() if config is None else config
    elif config is not None:
        raise ValueError(f"config is given, and {directory} is quantized already; it must be None")
    else:
        settings.quantization_config = file_config.to_dict()
    if torch.device(device).type != "cpu":
        options["device_map"] = {"": device}
    with ExitStack() as stack:
        tensors = _open_tensors(paths, stack)
        stack.enter_context(_report_first_error(directory))
        stack.enter_context(_progress_bar_in_a_terminal())
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
        fields = file_io.read_json(generation)
        model.generation_config = transformers.GenerationConfig.from_dict(fields)
    return model, info


def _open_tensors(paths: list[Path], stack: ExitStack) -> dict:
    """Return all tensors by name; those of safetensors are slices, read when they are asked for."""
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
    except Exception as error:  # a configuration's class can raise anything
        raise CheckpointError(f"{path}: {_first_line(error)}") from None


def _architecture(
    directory: Path, settings: transformers.PreTrainedConfig, model_class: type | None
) -> type:
    """Return the model's class: `model_class`, an AutoModel's choice, or what config.json names."""
    if model_class is not None:
        if not isinstance(model_class, type) or not hasattr(model_class, "from_pretrained"):
            raise TypeError(
                f"model_class is {model_class!r}; it must be a model's class of transformers, or "
                "an AutoModel"
            )
        if issubclass(model_class, transformers.PreTrainedModel):
            return model_class
        with torch.device("meta"):
            return type(model_class.from_config(settings))
    name = (settings.architectures or [None])[0]
    architecture = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
        return architecture
    raise CheckpointError(
        f"{directory / 'config.json'}: architectures is {settings.architectures!r}, which "
        "transformers does not have; model_class must say which it is"
    )


def _file_quantization(
    directory: Path, settings: transformers.PreTrainedConfig
) -> NF4Config | None:
    """Return how the files are quantized already, or None if they are not."""
    config = getattr(settings, "quantization_config", None)
    if config is None:
        return None
    fields = config if isinstance(config, dict) else config.to_dict()
    method = fields.get("quant_method")
    is_4bit = fields.get("load_in_4bit") or fields.get("_load_in_4bit")
    try:
        if method == METHOD:
            return NF4Config(**fields)
        if method == "bitsandbytes" and is_4bit:
            return _from_bitsandbytes(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'}: quantization_config: {error}"
        ) from None
    raise CheckpointError(
        f"{directory} is quantized by {method!r}; it must be by bitsandbytes, to 4 bits, or not at "
        "all"
    )


def _from_bitsandbytes(fields: dict) -> NF4Config:
    """Return the NF4Config of bitsandbytes' fields; absent ones have bitsandbytes' defaults."""
    return NF4Config(
        nested=fields.get("bnb_4bit_use_double_quant", False),
        quant_type=fields.get("bnb_4bit_quant_type", "fp4"),
        skip=fields.get("llm_int8_skip_modules"),
    )


def _check_finite(directory: Path, model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.is_floating_point() and not bool(p.isfinite().all()):
            raise CheckpointError(f"{directory}: {name} holds NaN or infinite values")


def _check_complete(directory: Path, info: dict) -> None:
    """Check that transformers saw no missing, unknown or misshapen entry."""
    mismatched = sorted(info["mismatched_keys"], key=lambda item: item[0])
    if mismatched:
        key, shape, expected = mismatched[0]
        raise CheckpointError(
            f"{directory}: {key} has shape {list(shape)}; it must be {list(expected)}"
        )
    faults = {"missing_keys": "is missing", "unexpected_keys": "has no place in the model"}
    for field, fault in faults.items():
        if info[field]:
            first, *others = sorted(info[field])
            more = f", and so {len(others)} others" if others else ""
            raise CheckpointError(
                f"{directory}: {first} {fault}{more}; strict=False goes on without"
            )


@contextmanager
def _report_first_error(directory: Path) -> Iterator[None]:
    """Raise the error of the first damaged weight, which transformers puts into a table."""
    errors = []
    token = load_errors.set(errors)
    try:
        yield
    except RuntimeError:
        if not errors:
            raise
        raise CheckpointError(f"{directory}: {errors[0]}") from None
    finally:
        load_errors.reset(token)


@contextmanager
def _progress_bar_in_a_terminal() -> Iterator[None]:
    """Disable transformers' progress bar unless stderr is a terminal, to keep log files clean."""
    disables = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if disables:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if disables:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
