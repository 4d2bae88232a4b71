"""A transformers checkpoint on disk: its model, checked and loaded, and its tokenizer.

transformers is optional, so functions import it when they need it.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from pyfast.finetune.errors import JobError
from pyfast.formats import file_io
from pyfast.nn.linear_layers import TASK_HEADS

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Pretrained(NamedTuple):
    """A loaded checkpoint."""

    model: nn.Module
    tokenizer: object
    new_modules: list[str]  # names of the head and of modules without weights in the checkpoint


def load(
    directory: str,
    labels: Sequence[str] | None,
    allow_pickle: bool,
    dtype: torch.dtype,
    method: str | None = None,
) -> Pretrained:
    """Load a model and its tokenizer from a directory.

    For the method "qlora", and where the checkpoint is in 4 bits, the model is in 4 bits and never
    in memory otherwise.

    Args:
        directory: a transformers checkpoint.
        labels: names of the classes of a classifier; None for a language model.
        allow_pickle: whether pickled weights may be read.
        dtype: dtype of the weights that are not in 4 bits.
        method: the fine-tuning method, or None.

    Raises:
        JobError: the checkpoint is missing, damaged, or not of the method.
    """
    transformers, path = _import_transformers(), Path(directory)
    _check_directory(path, allow_pickle)
    model_class = transformers.AutoModelForSequenceClassification
    if labels is None:
        model_class = transformers.AutoModelForCausalLM
    names = None if labels is None else dict(enumerate(labels))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        is_quantized = "quantization_config" in file_io.read_json(path / "config.json")
        read = _read_quantized if method == "qlora" or is_quantized else _read
        model, info = read(path, model_class, names, allow_pickle, dtype)
    except Exception as error:  # a damaged checkpoint raises anything
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise JobError(f"--model {directory} cannot be loaded: {reason}") from None
    if is_quantized and method == "full":
        raise JobError(
            f"--model {directory} is in 4 bits, which do not train in full; "
            "--method must be another"
        )
    missing = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    _check_body(directory, model, missing)
    _choose_padding(model, tokenizer)
    new_modules = {key.rpartition(".")[0] for key in missing}
    if labels is not None:
        new_modules |= {name for name in TASK_HEADS["SEQ_CLS"] if hasattr(model, name)}
    return Pretrained(model, tokenizer, _outermost(new_modules))


def _import_transformers():
    """Return transformers, which then prints errors only."""
    try:
        import transformers  # optional
    except ImportError:
        raise JobError("transformers is not installed; pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers


def _read(
    directory: Path,
    model_class: type,
    labels: dict[int, str] | None,
    allow_pickle: bool,
    dtype: torch.dtype,
) -> tuple[nn.Module, dict]:
    """Read a model as it is; also return what transformers says of missing entries."""
    options = {"local_files_only": True, "trust_remote_code": False}
    options["use_safetensors"] = None if allow_pickle else True
    if labels is not None:
        options["num_labels"], options["id2label"] = len(labels), labels
        options["label2id"] = {name: i for i, name in labels.items()}
        options["ignore_mismatched_sizes"] = True  # the head of another task
    return model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)


def _read_quantized(
    directory: Path,
    model_class: type,
    labels: dict[int, str] | None,
    allow_pickle: bool,
    dtype: torch.dtype,
) -> tuple[nn.Module, dict]:
    """Read a model to 4 bits; also return what transformers says of missing entries."""
    from pyfast.hf.loading import load_with_info  # optional: it imports transformers

    return load_with_info(
        directory, model_class, dtype=dtype, allow_pickle=allow_pickle, labels=labels
    )


def _check_directory(directory: Path, allow_pickle: bool) -> None:
    if not directory.is_dir():
        raise JobError(
            f"--model {directory} is not a directory; it must be a transformers checkpoint"
        )
    if not (directory / "config.json").exists():
        raise JobError(
            f"--model {directory} has no config.json; it must be a transformers checkpoint"
        )
    files = {name for name in (*_WEIGHTS, *_PICKLES) if (directory / name).exists()}
    if not files:
        raise JobError(f"--model {directory} has no weights; it must have {_WEIGHTS[0]}")
    if not files & set(_WEIGHTS) and not allow_pickle:
        raise JobError(
            f"--model {directory} has pickled weights only, which can run code when read; "
            "--allow-pickle reads them"
        )


def _check_body(directory: str, model: nn.Module, missing: Iterable[str]) -> None:
    """Raise JobError unless the missing weights are those of heads or of the pooler before one."""
    for key in sorted(missing):
        if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key.split("."):
            raise JobError(
                f"--model {directory} has no {key} of the model's shape; "
                "it is damaged, or of another kind"
            )


def _choose_padding(model: nn.Module, tokenizer) -> None:
    """Set the padding token to one that the model has an embedding for."""
    rows = _count_embeddings(model)
    choices = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    model.config.pad_token_id = next(i for i in choices if i is not None and 0 <= i < rows)


def _count_embeddings(model: nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _outermost(names: Iterable[str]) -> list[str]:
    """Return the names that lie in none of the other modules."""
    names = sorted(names)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


# --- tokens ---


def make_encoder(
    tokenizer, length: int | None, model: nn.Module | None = None
) -> Callable[[str], list[int]]:
    """Return a function from a text to its tokens.

    Args:
        tokenizer: transformers' tokenizer of the model.
        length: largest number of tokens, special tokens included; None for all tokens of the text
            without special ones.
        model: a model that must have an embedding for each token; the function raises JobError
            where it has none.
    """
    options = {"truncation": True, "max_length": length}
    if length is None:
        options = {"add_special_tokens": False}
    rows = math.inf if model is None else _count_embeddings(model)

    def encode(text: str) -> list[int]:
        tokens = tokenizer(text, **options)["input_ids"]
        if (highest := max(tokens, default=0)) >= rows:
            raise JobError(
                f"the tokenizer has a token {highest}, and the model {rows} embeddings; "
                "they do not fit"
            )
        return tokens

    return encode


def limit_length(model: nn.Module, tokenizer, length: int) -> int:
    """Return the length, or the number of tokens that the model takes if that is smaller."""
    return min(length, max_positions(model) or length, tokenizer.model_max_length)


def max_positions(model: nn.Module) -> int | None:
    """Return how many tokens the model takes, or None if that is not limited.

    RoBERTa's positions begin after the padding's, so that some of its embeddings are for no token.
    """
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return module.num_embeddings - padding - 1
    return getattr(model.config, "max_position_embeddings", None)
