"""What a fine-tuning changes in a transformers model: the model read, prepared for each method, written, read again."""

import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pyfast.adapters.api import add_adapters, add_lora
from pyfast.adapters.bottleneck.config import AdapterConfig
from pyfast.adapters.files import load_adapter, save_adapter
from pyfast.adapters.lora.config import LoRAConfig
from pyfast.adapters.quantization import LM_HEAD, quantize
from pyfast.adapters.selection import select
from pyfast.finetune.errors import JobError
from pyfast.formats import file_io
from pyfast.nn.linear_layers import ALL_LINEAR, HEADS
from pyfast.nn.nf4_linear import NF4Linear

LORAS = ("lora", "dora", "qlora")
METHODS = ("full", "select", "adapter", *LORAS)
_TASK_TYPES = {"classify": "SEQ_CLS", "lm": "CAUSAL_LM"}  # PEFT's
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Options:
    """Of the methods; each reads its own."""

    rank: int = 16  # lora, dora, qlora
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | Sequence[str] = (
        ALL_LINEAR  # lora and the like; adapter: instead of the style's places
    )
    select: Sequence[str] = ()  # patterns of names
    bottleneck: int = 64  # adapter
    style: str = "houlsby"


USED_BY = {
    "rank": LORAS,
    "alpha": LORAS,
    "dropout": (*LORAS, "adapter"),
    "targets": (*LORAS, "adapter"),
    "select": ("select",),
    "bottleneck": ("adapter",),
    "style": ("adapter",),
}


def check(method: str, options: Options) -> None:
    """Options that the method needs, and has."""
    if method == "select" and not options.select:
        raise ValueError(
            "select is empty; the method select needs patterns of names, e.g. 'encoder.layer.11.*'"
        )
    if method != "select" and options.select:
        raise ValueError(
            f"select is {list(options.select)}, and the method is {method}; it must be select"
        )
    if options.targets != ALL_LINEAR and method not in USED_BY["targets"]:
        may_be = " or ".join(USED_BY["targets"])
        raise ValueError(
            f"targets is {options.targets}, and the method is {method}; it must be {may_be}"
        )


# --- transformers ---


def _transformers():
    try:
        import transformers
    except ImportError:
        raise JobError("transformers is not installed; pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers


def load(
    directory: str,
    labels: Sequence[str] | None,
    allow_pickle: bool,
    dtype: torch.dtype,
    method: str | None = None,
):
    """The model, a classifier if there are labels; its tokenizer; its head, and modules that have
    no weights there.

    For qlora, and where it is so on the disk, the model is in 4 bits, and never in memory
    otherwise.
    """
    transformers, path = _transformers(), Path(directory)
    _check_directory(path, allow_pickle)
    kind = (
        transformers.AutoModelForCausalLM
        if labels is None
        else transformers.AutoModelForSequenceClassification
    )
    names = None if labels is None else dict(enumerate(labels))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        quantized = "quantization_config" in file_io.read_json(path / "config.json")
        read = _read_quantized if method == "qlora" or quantized else _read
        model, info = read(path, kind, names, allow_pickle, dtype)
    except Exception as error:  # a damaged checkpoint raises anything
        why = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise JobError(f"--model {directory} cannot be loaded: {why}") from None
    if quantized and method == "full":
        raise JobError(
            f"--model {directory} is in 4 bits, which do not train in full; --method must be another"
        )
    missing = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    _check_body(directory, model, missing)
    _choose_padding(model, tokenizer)
    heads = [name for name in HEADS["SEQ_CLS"] if labels is not None and hasattr(model, name)]
    return model, tokenizer, _outermost({*heads, *(key.rpartition(".")[0] for key in missing)})


def _read(
    directory: Path,
    kind: type,
    labels: dict[int, str] | None,
    allow_pickle: bool,
    dtype: torch.dtype,
):
    options = {
        "use_safetensors": None if allow_pickle else True,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    if labels is not None:
        options |= {
            "num_labels": len(labels),
            "id2label": labels,
            "label2id": {name: i for i, name in labels.items()},
        }
        options["ignore_mismatched_sizes"] = True  # the head of another task
    return kind.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)


def _read_quantized(
    directory: Path,
    kind: type,
    labels: dict[int, str] | None,
    allow_pickle: bool,
    dtype: torch.dtype,
):
    from pyfast.hf.loading import load_with_info  # imports transformers

    return load_with_info(directory, kind, dtype=dtype, allow_pickle=allow_pickle, labels=labels)


def _check_body(directory: str, model: nn.Module, missing: Iterable[str]) -> None:
    """Heads, and the pooler before one, may begin anew, but nothing else."""
    for key in sorted(missing):
        if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key.split("."):
            raise JobError(
                f"--model {directory} has no {key} of the model's shape; it is damaged, or of another kind"
            )


def _choose_padding(model: nn.Module, tokenizer) -> None:
    """A token that the model has an embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    choices = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    model.config.pad_token_id = next(i for i in choices if i is not None and 0 <= i < rows)


def _check_directory(directory: Path, allow_pickle: bool) -> None:
    if not directory.is_dir():
        raise JobError(
            f"--model {directory} is not a directory; it must be a transformers checkpoint"
        )
    if not (directory / "config.json").exists():
        raise JobError(
            f"--model {directory} has no config.json; it must be a transformers checkpoint"
        )
    has = {name for name in (*_WEIGHTS, *_PICKLES) if (directory / name).exists()}
    if not has:
        raise JobError(f"--model {directory} has no weights; it must have {_WEIGHTS[0]}")
    if not has & set(_WEIGHTS) and not allow_pickle:
        raise JobError(
            f"--model {directory} has pickled weights only, which can run code when read; --allow-pickle reads them"
        )


def _outermost(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def encoder(
    tokenizer, length: int | None, model: nn.Module | None = None
) -> Callable[[str], list[int]]:
    """Text to tokens, which the model must know; cut off at the length, or without the special tokens around."""
    options = (
        {"add_special_tokens": False}
        if length is None
        else {"truncation": True, "max_length": length}
    )
    rows = math.inf if model is None else model.get_input_embeddings().weight.shape[0]

    def encode(text: str) -> list[int]:
        tokens = tokenizer(text, **options)["input_ids"]
        if (highest := max(tokens, default=0)) >= rows:
            raise JobError(
                f"the tokenizer has a token {highest}, and the model {rows} embeddings; they do not fit"
            )
        return tokens

    return encode


# --- the methods ---


def apply(
    model: nn.Module, method: str, options: Options, task: str, new: Sequence[str]
) -> nn.Module:
    """Makes trainable what the method trains, and the modules that begin without weights of their own."""
    _prepare(model, method, new)
    if method == "full":
        model.requires_grad_(True)
    elif method == "select":
        select(model, [*options.select, *new])
    elif method == "adapter":
        own = {"bottleneck": options.bottleneck, "style": options.style, "dropout": options.dropout}
        own["targets"] = None if options.targets == ALL_LINEAR else options.targets
        add_adapters(model, AdapterConfig(**own, modules_to_save=new))
    else:
        add_lora(model, _lora_config(method, options, task, new))
    return model


def _prepare(model: nn.Module, method: str, new: Sequence[str]) -> None:
    """The base in 4 bits for qlora, where it was not read so; new modules in float32, as they train."""
    if method == "qlora" and not any(isinstance(module, NF4Linear) for module in model.modules()):
        quantize(model, skip=[LM_HEAD, *new])
    for name in new:
        model.get_submodule(name).float()


def _lora_config(method: str, options: Options, task: str, new: Sequence[str]) -> LoRAConfig:
    return LoRAConfig(
        r=options.rank,
        alpha=options.alpha,
        targets=options.targets,
        dropout=options.dropout,
        dora=method == "dora",
        modules_to_save=new,
        task_type=_TASK_TYPES[task],
    )


# --- the result ---


def write(model: nn.Module, tokenizer, method: str, out: Path) -> None:
    """What was trained, in the form that its kind is read in."""
    if method == "full":
        _write_checkpoint(model, tokenizer, out)
    else:
        save_adapter(model, out)


def restore(model: nn.Module, method: str, new: Sequence[str], out: Path) -> nn.Module:
    """A model as it was loaded, with what `write` wrote; a full one was loaded from there."""
    _prepare(model, method, new)
    return model if method == "full" else load_adapter(model, out, trainable=False)


def _write_checkpoint(model: nn.Module, tokenizer, out: Path) -> None:
    """transformers' files, config.json last: without it the others are not read."""
    with tempfile.TemporaryDirectory(prefix=".model.", dir=out) as aside:
        try:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        except Exception as error:  # their writers raise anything
            raise JobError(
                f"{out} cannot be written: {str(error).strip().splitlines()[0]}"
            ) from None
        for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(out / path.name)
    file_io.sync(out)
