"""What a fine-tuning changes in a transformers model: the model read, prepared for each method, written, read again."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pyfast import files
from pyfast.adapter_config import AdapterConfig
from pyfast.adapter_files import load_adapter, save_adapter
from pyfast.data import JobError
from pyfast.finetune import add_adapters, add_lora
from pyfast.lora_config import ALL_LINEAR, HEADS, LoRAConfig
from pyfast.quantize import LM_HEAD, quantize
from pyfast.selection import select

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
    targets: str | Sequence[str] = ALL_LINEAR
    select: Sequence[str] = ()  # patterns of names
    bottleneck: int = 64  # adapter
    style: str = "houlsby"


def check(method: str, options: Options) -> None:
    """Options that the method needs, and has."""
    if method == "select" and not options.select:
        raise ValueError("select is empty; the method select needs patterns of names, e.g. 'encoder.layer.11.*'")
    if method != "select" and options.select:
        raise ValueError(f"select is {list(options.select)}, and the method is {method}; it must be select")
    if options.targets != ALL_LINEAR and method not in LORAS:
        raise ValueError(f"targets is {options.targets}, and the method is {method}; it must be {' or '.join(LORAS)}")


# --- transformers ---


def _transformers():
    try:
        import transformers
    except ImportError:
        raise JobError("transformers is not installed; pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load(directory: str, labels: Sequence[str] | None, allow_pickle: bool, dtype: torch.dtype):
    """The model, a classifier if there are labels; its tokenizer; its head, and modules that have no weights there."""
    transformers = _transformers()
    _check_directory(Path(directory), allow_pickle)
    kind, options = transformers.AutoModelForCausalLM, {}
    if labels is not None:
        names = dict(enumerate(labels))
        options = {"num_labels": len(labels), "id2label": names, "label2id": {name: i for i, name in names.items()}}
        options["ignore_mismatched_sizes"] = True  # the head of another task
        kind = transformers.AutoModelForSequenceClassification
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        options |= {"local_files_only": True, "output_loading_info": True, "dtype": dtype}
        model, info = kind.from_pretrained(directory, use_safetensors=None if allow_pickle else True, **options)
    except Exception as error:  # a damaged checkpoint raises anything
        why = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise JobError(f"--model {directory} cannot be loaded: {why}") from None
    if model.config.pad_token_id is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        model.config.pad_token_id = 0 if pad is None else pad
    missing = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    heads = [name for name in HEADS["SEQ_CLS"] if labels is not None and hasattr(model, name)]
    return model, tokenizer, _outermost({*heads, *(key.rpartition(".")[0] for key in missing)})


def _check_directory(directory: Path, allow_pickle: bool) -> None:
    if not directory.is_dir():
        raise JobError(f"--model {directory} is not a directory; it must be a transformers checkpoint")
    if not (directory / "config.json").exists():
        raise JobError(f"--model {directory} has no config.json; it must be a transformers checkpoint")
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


def encoder(tokenizer, length: int | None) -> Callable[[str], list[int]]:
    """Text to tokens; cut off at the length, or without the special tokens around."""
    if length is None:
        return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    return lambda text: tokenizer(text, truncation=True, max_length=length)["input_ids"]


# --- the methods ---


def apply(model: nn.Module, method: str, options: Options, task: str, new: Sequence[str]) -> nn.Module:
    """Makes trainable what the method trains, and the modules that begin without weights of their own."""
    _prepare(model, method, new)
    if method == "full":
        model.requires_grad_(True)
    elif method == "select":
        select(model, [*options.select, *new])
    elif method == "adapter":
        own = {"bottleneck": options.bottleneck, "style": options.style, "dropout": options.dropout}
        add_adapters(model, AdapterConfig(**own, modules_to_save=new))
    else:
        add_lora(model, _lora_config(method, options, task, new))
    return model


def _prepare(model: nn.Module, method: str, new: Sequence[str]) -> None:
    """The base as the method has it; new modules in float32, as they train."""
    if method == "qlora":
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
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(out / path.name)
    files.sync_directory(out)
