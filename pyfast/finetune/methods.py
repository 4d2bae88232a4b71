"""The methods of fine-tuning: what each trains in a model, and how its result is written and read.

Methods are "full" (all weights), "select" (some of them), "adapter" (bottleneck adapters), "lora",
"dora" and "qlora".
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pyfast.adapters.api import add_adapters, add_lora
from pyfast.adapters.bottleneck.config import AdapterConfig
from pyfast.adapters.files import load_adapter, save_adapter
from pyfast.adapters.lora.config import LoRAConfig
from pyfast.adapters.quantization import LM_HEAD, quantize
from pyfast.adapters.selection import select
from pyfast.finetune.errors import JobError
from pyfast.formats import file_io
from pyfast.nn.linear_layers import ALL_LINEAR
from pyfast.nn.nf4_linear import NF4Linear

LORAS = ("lora", "dora", "qlora")
METHODS = ("full", "select", "adapter", *LORAS)
_TASK_TYPES = {"classify": "SEQ_CLS", "lm": "CAUSAL_LM"}  # PEFT's names of the tasks
USED_BY = {
    "rank": LORAS,
    "alpha": LORAS,
    "dropout": (*LORAS, "adapter"),
    "targets": (*LORAS, "adapter"),
    "select": ("select",),
    "bottleneck": ("adapter",),
    "style": ("adapter",),
    "share_inputs": LORAS,
}


@dataclass(frozen=True)
class Options:
    """Options of the methods; `USED_BY` says which methods use each.

    Args:
        rank: rank of LoRA's update.
        alpha: scale of LoRA's update, which is multiplied by alpha / rank.
        dropout: dropout probability.
        targets: last parts of the names of the layers to adapt. "all-linear" stands for every
            linear layer but the head, and with the method "adapter" for the places of `style`.
        select: patterns of the names of the parameters to train.
        bottleneck: size of an adapter's bottleneck.
        style: places of adapters, "houlsby" or "pfeiffer".
        share_inputs: whether layers that have one input (q, k, v; gate, up) are computed in one
            pass over it; on CUDA only.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | Sequence[str] = ALL_LINEAR
    select: Sequence[str] = ()
    bottleneck: int = 64
    style: str = "houlsby"
    share_inputs: bool = False


def check_options(method: str, options: Options) -> None:
    """Raise ValueError if the method lacks an option that it needs, or has another method's."""
    if method == "select" and not options.select:
        raise ValueError(
            "select is empty; the method select needs patterns of names, e.g. 'encoder.layer.11.*'"
        )
    if method != "select" and options.select:
        raise ValueError(
            f"select is {list(options.select)}, and the method is {method}; it must be select"
        )
    if options.targets != ALL_LINEAR and method not in USED_BY["targets"]:
        users = " or ".join(USED_BY["targets"])
        raise ValueError(
            f"targets is {options.targets}, and the method is {method}; it must be {users}"
        )


# --- training ---


def apply(
    model: nn.Module, method: str, options: Options, task: str, new_modules: Sequence[str]
) -> nn.Module:
    """Make trainable what the method trains, and return the model.

    Args:
        model: the loaded model; changed in place.
        method: one of METHODS.
        options: the method's options.
        task: "classify" or "lm".
        new_modules: names of modules without pretrained weights; they train, too.
    """
    _prepare(model, method, new_modules)
    if method == "full":
        model.requires_grad_(True)
    elif method == "select":
        select(model, [*options.select, *new_modules])
    elif method == "adapter":
        add_adapters(model, _adapter_config(options, new_modules))
    else:
        add_lora(model, _lora_config(method, options, task, new_modules))
    return model


def _prepare(model: nn.Module, method: str, new_modules: Sequence[str]) -> None:
    """Quantize the model for qlora, if it was not read so; cast new modules to float32."""
    is_quantized = any(isinstance(module, NF4Linear) for module in model.modules())
    if method == "qlora" and not is_quantized:
        quantize(model, skip=[LM_HEAD, *new_modules])
    for name in new_modules:
        model.get_submodule(name).float()


def _adapter_config(options: Options, new_modules: Sequence[str]) -> AdapterConfig:
    return AdapterConfig(
        bottleneck=options.bottleneck,
        style=options.style,
        dropout=options.dropout,
        targets=None if options.targets == ALL_LINEAR else options.targets,
        modules_to_save=new_modules,
    )


def _lora_config(
    method: str, options: Options, task: str, new_modules: Sequence[str]
) -> LoRAConfig:
    return LoRAConfig(
        r=options.rank,
        alpha=options.alpha,
        targets=options.targets,
        dropout=options.dropout,
        dora=method == "dora",
        share_inputs=options.share_inputs,
        modules_to_save=new_modules,
        task_type=_TASK_TYPES[task],
    )


# --- the result ---


def write(model: nn.Module, tokenizer, method: str, out: Path) -> None:
    """Write what was trained: a transformers checkpoint for "full", else the adapter's files."""
    if method == "full":
        _write_checkpoint(model, tokenizer, out)
    else:
        save_adapter(model, out)


def restore(model: nn.Module, method: str, new_modules: Sequence[str], out: Path) -> nn.Module:
    """Return the loaded model with what `write` wrote to `out`.

    With the method "full" the model was loaded from `out` itself.
    """
    _prepare(model, method, new_modules)
    return model if method == "full" else load_adapter(model, out, trainable=False)


def _write_checkpoint(model: nn.Module, tokenizer, out: Path) -> None:
    """Write transformers' files, config.json last: without it the others are not read."""
    with tempfile.TemporaryDirectory(prefix=".model.", dir=out) as aside:
        try:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        except Exception as error:  # transformers' writers raise anything
            reason = str(error).strip().splitlines()[0]
            raise JobError(f"{out} cannot be written: {reason}") from None
        for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(out / path.name)
    file_io.sync(out)
