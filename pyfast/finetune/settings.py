"""Settings of a training run."""

import math
from dataclasses import dataclass

from pyfast._support import checks
from pyfast.finetune.learning_rate import SCHEDULES

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        epochs: over the data. steps: instead of epochs. batch: rows of a forward pass, over all
        processes. accumulation: passes a step. lr: AdamW's rate, where the schedule is at its
        highest. schedule: "constant", "linear" or "cosine". warmup: steps in which the rate goes
        up; below 1, their share of all steps. weight_decay: of matrices. clip: the most that the
        gradient's norm may be. precision: "fp32", or "bf16" (autocast). seed: of the rows' order
        and of dropout. log_every: steps; so also eval_every and save_every, which are an epoch
        where None. patience: evaluations without a lower loss before it stops, and takes the
        weights of the lowest. guard: whether a rate that is too high stops it.
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
        for name in (
            "batch",
            "accumulation",
            "log_every",
            "steps",
            "eval_every",
            "save_every",
            "patience",
        ):
            value = getattr(self, name)
            may_be_none = name not in ("batch", "accumulation", "log_every")
            if not (value is None and may_be_none) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be an integer, 1 or more")
        for name in ("epochs", "lr", "clip", "warmup", "weight_decay"):
            value, least = getattr(self, name), 0 if name in ("warmup", "weight_decay") else 1e-12
            if not isinstance(value, int | float) or not least <= value < math.inf:
                raise ValueError(
                    f"{name} is {value!r}; it must be a finite number{', above 0' * (least > 0)}"
                )
        checks.one_of("schedule", self.schedule, SCHEDULES)
        checks.one_of("precision", self.precision, PRECISIONS)
        checks.seed(self.seed)
