"""What a trained model says to a text: its label, or how it goes on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from pyfast.finetune import methods
from pyfast.finetune.errors import JobError
from pyfast.finetune.job import Job, dtype_of, length_of, positions_of, read_job
from pyfast.finetune.trainer import autocast


class Trained(NamedTuple):
    """A finished job, ready to use."""

    model: nn.Module
    tokenizer: object
    labels: list[str] | None
    job: Job


def load(directory: str, model: str | None = None, device: str = "cpu") -> Trained:
    """The output of a fine-tuning, over the model it was made from; that may have moved."""
    job, labels = read_job(Path(directory))
    source = directory if job.method == "full" else model or job.model
    base, tokenizer, new = methods.load(source, labels, job.allow_pickle, dtype_of(job), job.method)
    return Trained(
        methods.restore(base, job.method, new, Path(directory)).to(device).eval(),
        tokenizer,
        labels,
        job,
    )


@torch.no_grad()
def classify(trained: Trained, texts: Sequence[str]) -> Iterator[tuple[str, float]]:
    """For each text a label and its probability."""
    length = length_of(trained.model, trained.tokenizer, trained.job.max_length)
    encode = methods.encoder(trained.tokenizer, length, trained.model)
    for text in texts:
        tokens = torch.tensor([encode(text)], device=trained.model.device)
        if not tokens.numel():
            raise JobError(f"text {text!r} has no tokens")
        with autocast(tokens.device, trained.job.training.precision):
            logits = trained.model(input_ids=tokens).logits[0]
        probability, label = logits.float().softmax(-1).max(-1)
        yield trained.labels[label], probability.item()


@torch.no_grad()
def continue_texts(trained: Trained, texts: Sequence[str], tokens: int) -> Iterator[str]:
    """Each text, and the most probable next tokens, one after the other."""
    model, pad, positions = (
        trained.model,
        trained.model.config.pad_token_id,
        positions_of(trained.model),
    )
    encode = methods.encoder(trained.tokenizer, None, model)
    if tokens < 1:
        raise JobError(f"--tokens is {tokens}; it must be 1 or more")
    for text in texts:
        ids = torch.tensor([encode(text)], dtype=torch.long, device=model.device)
        if not ids.numel():
            raise JobError(f"text {text!r} has no tokens")
        if positions is not None and ids.numel() + tokens > positions:
            raise JobError(
                f"a text of {ids.numel()} tokens and --tokens {tokens} are over the model's {positions}"
            )
        greedy = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": pad}
        with autocast(ids.device, trained.job.training.precision):
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        yield trained.tokenizer.decode(found[0], skip_special_tokens=True)
