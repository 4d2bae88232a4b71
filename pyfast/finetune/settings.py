"""Settings of a training run."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from pyfast._support import checks
from pyfast.finetune.learning_rate import SCHEDULES

PRECISIONS = ("fp32", "bf16")
_COUNTS = ("batch", "accumulation", "log_every")
_OPTIONAL_COUNTS = ("steps", "eval_every", "save_every", "patience")
_POSITIVE = ("epochs", "lr", "clip")
_NOT_NEGATIVE = ("warmup", "weight_decay")


@dataclass(frozen=True)
class Settings:
    """Settings of a training run; all of them are in the output's finetune.json.

    Args:
        epochs: passes over the data; need not be whole.
        steps: optimizer steps in all; replaces `epochs` if set.
        batch: rows of a forward pass, over all processes.
        accumulation: forward passes of an optimizer step.
        lr: AdamW's learning rate at the highest point of the schedule.
        schedule: course of the rate after the warmup: "constant", "linear" or "cosine".
        warmup: steps in which the rate rises; below 1, a share of all steps.
        weight_decay: AdamW's weight decay of matrices; vectors have none.
        clip: largest norm of the gradient; a larger one is scaled down to it.
        precision: "fp32", or "bf16" for autocast to bfloat16.
        seed: seed of the order of rows and of dropout.
        log_every: steps between two records of the log.
        eval_every: steps between two evaluations; None for an epoch.
        save_every: steps between two saved states; None for an epoch.
        patience: evaluations in a row without a lower loss after which training stops and takes
            the weights of the lowest loss; None for never.
        guard: whether training stops when the learning rate is too high.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> from pyfast.finetune.settings import Settings
        >>> Settings(epochs=1, lr=1e-3).schedule
        'linear'
    """

    epochs: float = 3.0
    steps: int | None = None
    batch: int = 16
    accumulation: int = 1
    lr: float = 2e-4
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: str = "fp32"
    seed: int = 0
    log_every: int = 1
    eval_every: int | None = None
    save_every: int | None = None
    patience: int | None = None
    guard: bool = True

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *_OPTIONAL_COUNTS):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_COUNTS:
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer, 1 or more")
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            value, least = getattr(self, name), 1e-12 if name in _POSITIVE else 0
            if not checks.is_finite_number(value) or value < least:
                above = ", above 0" if name in _POSITIVE else ""
                raise ValueError(f"{name} is {value!r}; it must be a finite number{above}")
        checks.one_of("schedule", self.schedule, SCHEDULES)
        checks.one_of("precision", self.precision, PRECISIONS)
        checks.seed(self.seed)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context in which a model of this precision runs."""
        if self.precision == "bf16":
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()
