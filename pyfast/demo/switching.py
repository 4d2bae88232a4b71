"""Two adapters on one model: trained, written, loaded together, switched, and mixed in a batch."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pyfast.adapters.api import mixed_batch, set_adapter
from pyfast.adapters.files import load_adapter
from pyfast.demo.training import FineTuning, Task, Variant
from pyfast.finetune import pretrained
from pyfast.finetune.distributed import World

_SWITCHES = 50  # over which the time of one is measured


def train_and_switch(
    checkpoint: Path,
    tasks: dict[str, Task],
    variant: Variant,
    out: Path,
    model_path: str,
    texts: Sequence[str],
) -> dict:
    """Train an adapter for each task, load all into one model, and ask each about the texts.

    Args:
        checkpoint: directory of the pretrained model.
        tasks: the tasks by name; their labels are the same.
        variant: method and options.
        out: directory for the adapters, each in a folder with its task's name.
        model_path: where the checkpoint will be when the adapters are used.
        texts: texts to label.
    """
    result = {"tasks": {}, "sentences": []}
    for name, task in tasks.items():
        fine_tuning = FineTuning(checkpoint, task, variant)
        accuracy = fine_tuning.run()["accuracy"]
        fine_tuning.write(out / name, model_path)
        size = (out / name / "adapter_model.safetensors").stat().st_size
        result["tasks"][name] = {"accuracy": accuracy, "bytes": size}
    labels = next(iter(tasks.values())).labels
    model, tokenizer, _ = pretrained.load(str(checkpoint), labels, False, torch.float32)
    for name in tasks:
        load_adapter(model, out / name, name, trainable=False)
    model.to(World.join().device).eval()
    for text in texts:
        answers = {name: _label(model, tokenizer, name, text, labels) for name in tasks}
        result["sentences"].append({"text": text} | answers)
    result["switch_seconds"] = _time_switch(model, list(tasks))
    result["mixed_agrees"] = _is_mixed_batch_right(model, tokenizer, list(tasks), texts, labels)
    return result


def _label(
    model: nn.Module, tokenizer, adapter_name: str, text: str, labels: Sequence[str]
) -> list:
    """Return the label of a text by one adapter, and its probability."""
    set_adapter(model, adapter_name)
    probability, label = _compute_logits(model, tokenizer, [text])[0].softmax(-1).max(-1)
    return [labels[label], probability.item()]


@torch.no_grad()
def _compute_logits(model: nn.Module, tokenizer, texts: Sequence[str]) -> torch.Tensor:
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt").to(model.device)
    return model(**inputs).logits


def _time_switch(model: nn.Module, names: Sequence[str]) -> float:
    """Return the mean seconds of a switch from one adapter to the next."""
    begin = time.perf_counter()
    for i in range(_SWITCHES):
        set_adapter(model, names[i % len(names)])
    return (time.perf_counter() - begin) / _SWITCHES


def _is_mixed_batch_right(
    model: nn.Module,
    tokenizer,
    names: Sequence[str],
    texts: Sequence[str],
    labels: Sequence[str],
) -> bool:
    """Return whether a batch whose rows take turns in adapters gives the labels of single texts."""
    rows = [names[i % len(names)] for i in range(len(texts))]
    with mixed_batch(model, rows):
        numbers = _compute_logits(model, tokenizer, texts).argmax(-1)
    for name, text, number in zip(rows, texts, numbers):
        if _label(model, tokenizer, name, text, labels)[0] != labels[number]:
            return False
    return True
