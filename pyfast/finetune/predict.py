"""Predictions of a fine-tuned model: the label of a text, or its continuation."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from pyfast.finetune import methods, pretrained
from pyfast.finetune.errors import JobError
from pyfast.finetune.job import Job, read_job


class TrainedModel(NamedTuple):
    """A fine-tuned model, ready to use; `labels` is None for a language model."""

    model: nn.Module
    tokenizer: object
    labels: list[str] | None
    job: Job


def load(directory: str, model: str | None = None, device: str = "cpu") -> TrainedModel:
    """Load a fine-tuned model from the output directory of its training.

    Args:
        directory: the output directory.
        model: directory of the model that was fine-tuned; by default where it was then.
        device: where the model will be.
    """
    job, labels = read_job(Path(directory))
    source = directory if job.method == "full" else model or job.model
    base, tokenizer, new_modules = pretrained.load(
        source, labels, job.allow_pickle, job.load_dtype, job.method
    )
    restored = methods.restore(base, job.method, new_modules, Path(directory))
    return TrainedModel(restored.to(device).eval(), tokenizer, labels, job)


@torch.no_grad()
def classify(trained: TrainedModel, texts: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield the label and its probability for each text."""
    model, tokenizer, labels, job = trained
    length = pretrained.limit_length(model, tokenizer, job.max_length)
    encode = pretrained.make_encoder(tokenizer, length, model)
    for text in texts:
        tokens = _encode_one(encode, text, model.device)
        with job.training.autocast(tokens.device):
            logits = model(input_ids=tokens).logits[0]
        probability, label = logits.float().softmax(-1).max(-1)
        yield labels[label], probability.item()


@torch.no_grad()
def continue_texts(trained: TrainedModel, texts: Sequence[str], tokens: int) -> Iterator[str]:
    """Yield each text followed by so many tokens, each the most probable one."""
    model, tokenizer, _, job = trained
    if tokens < 1:
        raise JobError(f"--tokens is {tokens}; it must be 1 or more")
    positions = pretrained.max_positions(model)
    encode = pretrained.make_encoder(tokenizer, None, model)
    greedy = {"max_new_tokens": tokens, "do_sample": False}
    greedy["pad_token_id"] = model.config.pad_token_id
    for text in texts:
        ids = _encode_one(encode, text, model.device)
        if positions is not None and ids.numel() + tokens > positions:
            raise JobError(
                f"a text of {ids.numel()} tokens and --tokens {tokens} are over the model's "
                f"{positions}"
            )
        with job.training.autocast(ids.device):
            sequences = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        yield tokenizer.decode(sequences[0], skip_special_tokens=True)


def _encode_one(encode, text: str, device: torch.device) -> torch.Tensor:
    """Return the tokens of a text as a batch of one row."""
    ids = torch.tensor([encode(text)], dtype=torch.long, device=device)
    if not ids.numel():
        raise JobError(f"text {text!r} has no tokens")
    return ids
