"""The training loop. Everything random follows from the seed and the step's number, so that it can
stop at any step.

A step's loss is the mean over all its targets (tokens or texts), however these are spread over
micro-batches and processes; without dropout the weights are then the same for every such spread, up
to rounding.
"""

import math
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfast.finetune.data import IGNORED, Dataset, Order, mixed
from pyfast.finetune.distributed import World, put, unsynchronized, whole
from pyfast.finetune.learning_rate import (
    UNTOUCHED,
    Guard,
    RangeTest,
    RateTooHigh,
    factor,
    range_test,
)
from pyfast.finetune.settings import Settings

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's


class Trainer:
    """Trains what of the model requires gradients."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        settings: Settings,
        *,
        evaluation: Dataset | None = None,
        world: World | None = None,
        shard: bool = False,
    ) -> None:
        if settings.patience is not None and evaluation is None:
            raise ValueError(
                f"patience is {settings.patience}, and there is nothing to evaluate; give evaluation data"
            )
        self.model, self.data, self.settings, self.evaluation = model, data, settings, evaluation
        self.world = World() if world is None else world
        self.called = self.world.wrap(model, shard)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(
                "model has no parameter that requires a gradient; nothing would be trained"
            )
        self.optimizer = self._new_optimizer()
        self.order = Order(len(data), settings.batch * settings.accumulation, settings.seed)
        an_epoch = self.order.steps_an_epoch
        self.steps = settings.steps or math.ceil(settings.epochs * an_epoch)
        self.warmup = round(settings.warmup * (self.steps if settings.warmup < 1 else 1))
        self.eval_every, self.save_every = (
            settings.eval_every or an_epoch,
            settings.save_every or an_epoch,
        )
        self.done = 0
        self.guard: Guard | None = None
        self._guard_state: dict | None = None  # when it had seen the steps that are done
        self.best: dict = {}  # evaluation: its step, its figures, how many came after it
        self.best_weights: dict[str, Tensor] = {}
        self._saved = 0  # the step at which the state was saved
        self._seconds, self._tokens = time.monotonic(), 0

    def _new_optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.trained.values() if p.dim() > 1]
        others = [p for p in self.trained.values() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": others},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.settings.lr, weight_decay=0.0
        )

    # --- the loop ---

    def run(self, log: Callable[[dict], None], save: Callable[[], None]) -> None:
        """To the last step or the end of patience; `log` gets a record a step, `save` is called
        when the state is good.

        Raises RateTooHigh, with the state of that step still there.
        """
        if self.settings.guard and self.guard is None:
            self.guard = Guard(self._untouched())
        self._seconds, self._tokens = time.monotonic(), 0
        while self.done < self.steps and not self._out_of_patience():
            record = self._train_one(save)
            last = self.done == self.steps
            if self.evaluation is not None and (last or self.done % self.eval_every == 0):
                record |= self._judge()
            if last or "eval_loss" in record or self.done % self.settings.log_every == 0:
                log(record | self._speed())
        if self.guard is None or self.guard.calm():
            self._guard_state = self.guard and self.guard.state()
            save()
        if self.best_weights and self.best["step"] != self.done:
            self._put(self.best_weights)
            figures = {key: self.best[key] for key in ("eval_loss", "eval_accuracy")}
            log({"step": self.done, "epoch": self.epoch, "restored": self.best["step"], **figures})

    @property
    def epoch(self) -> float:
        return round(self.done / self.order.steps_an_epoch, 4)

    @property
    def rate(self) -> float:
        """Of the next step."""
        return self.settings.lr * factor(self.settings.schedule, self.done, self.steps, self.warmup)

    def _train_one(self, save: Callable[[], None]) -> dict:
        """A step. The state before it is saved here, its loss having been seen."""
        rate = self.rate
        loss, norm = self._gradients(self.done)
        if self.guard is not None:
            self._guard_state = self.guard.state()
            if why := self.guard.see(loss, norm):
                raise RateTooHigh(self.done + 1, self.settings.lr, why)
        if self.done >= self._saved + self.save_every and (self.guard is None or self.guard.calm()):
            self._saved = self.done
            save()
        self._apply(rate)
        self.done += 1
        return {"step": self.done, "epoch": self.epoch, "loss": loss, "lr": rate, "grad_norm": norm}

    def _gradients(self, step: int) -> tuple[float, float]:
        """Those of a step's rows, clipped; the loss, and their norm before."""
        rows, batch = self.order.step(step), self.settings.batch
        parts = [rows[first : first + batch] for first in range(0, len(rows), batch)]
        targets, total = self.data.targets(rows), torch.zeros((), device=self.world.device)
        self.called.train()
        for i, part in enumerate(parts):
            with nullcontext() if part is parts[-1] else unsynchronized(self.called):
                loss = self._loss(self.data, part, step, i)[0] / targets
                (loss * self.world.size).backward()  # gradients are means over the processes
            total += loss.detach()
        self._tokens += sum(len(self.data.tokens[row]) for row in rows)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.settings.clip)
        return self.world.sum(total).item(), whole(norm).item()

    def _loss(self, data: Dataset, rows: list[int], *numbers: int) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss of this process's share of the rows, and its logits and targets."""
        torch.manual_seed(mixed(self.settings.seed, *numbers, self.world.rank))
        inputs, targets = data.batch(self.world.share(rows), self.world.device)
        with autocast(self.world.device, self.settings.precision):
            logits = self.called(**inputs).logits
        flat = logits.float().flatten(0, -2)
        return (
            F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum"),
            logits,
            targets,
        )

    def _apply(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _untouched(self) -> list[float]:
        """The losses of the first steps' rows before any step."""
        self.called.train()
        losses = []
        for step in range(UNTOUCHED):
            rows = self.order.step(step)
            loss = self.world.sum(self._loss(self.data, rows, step)[0].detach())
            losses.append(loss.item() / self.data.targets(rows))
        return losses

    def _speed(self) -> dict:
        now = time.monotonic()
        speed = {"tokens_per_second": round(self._tokens / max(now - self._seconds, 1e-9), 1)}
        self._seconds, self._tokens = now, 0
        return speed | {"memory": _megabytes(self.world.device)}

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss, and the share of targets that have the highest logit."""
        self.called.eval()
        found = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        everything = range(len(self.evaluation))
        for first in range(0, len(everything), self.settings.batch):
            rows = list(everything[first : first + self.settings.batch])
            loss, logits, targets = self._loss(self.evaluation, rows)
            right = (logits.argmax(-1) == targets).sum()
            found += torch.stack([loss.double(), right.double()])
        loss, right = (self.world.sum(found) / self.evaluation.targets(everything)).tolist()
        return {"eval_loss": loss, "eval_accuracy": right}

    def _judge(self) -> dict[str, float]:
        """Evaluates, and with patience keeps the best weights."""
        figures = self.evaluate()
        if self.settings.patience is None:
            return figures
        if not self.best or figures["eval_loss"] < self.best["eval_loss"]:
            self.best = {"step": self.done, "later": 0, **figures}
            self.best_weights = {name: whole(p).cpu().clone() for name, p in self.trained.items()}
        else:
            self.best["later"] += 1
        return figures

    def _out_of_patience(self) -> bool:
        return (
            self.settings.patience is not None
            and self.best.get("later", 0) >= self.settings.patience
        )

    # --- the state ---

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """All that training goes on from: its tensors, the rest for JSON. Every process has to ask."""
        tensors = {f"model.{name}": whole(p) for name, p in self.trained.items()}
        tensors |= {f"best.{name}": value for name, value in self.best_weights.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = whole(value)
        return tensors, {"step": self.done, "best": self.best, "guard": self._guard_state}

    def load_state(
        self, tensors: dict[str, Tensor], fields: dict, *, new_rate: bool = False
    ) -> None:
        """Goes on from a state. With a new rate the guard forgets the losses it saw, not the untouched model."""
        self._check_state(tensors)
        self._put({name: tensors[f"model.{name}"] for name in self.trained})
        for name, parameter in self.trained.items():
            self.optimizer.state[parameter] = {
                "step": tensors[f"optimizer.step.{name}"].clone(),
                **{key: torch.zeros_like(parameter) for key in _MOMENTS[:2]},
            }
            for key in _MOMENTS[:2]:
                put(self.optimizer.state[parameter][key], tensors[f"optimizer.{key}.{name}"])
        self.best_weights = {
            name: tensors[f"best.{name}"] for name in self.trained if f"best.{name}" in tensors
        }
        self.done = self._saved = fields["step"]
        self.best = fields["best"]
        self.guard = (
            Guard.from_state(fields["guard"]) if fields["guard"] and self.settings.guard else None
        )
        if self.guard is not None and new_rate:
            self.guard.losses = []
        self._guard_state = fields["guard"]

    def _check_state(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            for key in (f"model.{name}", *(f"optimizer.{moment}.{name}" for moment in _MOMENTS)):
                shape = () if key.startswith("optimizer.step.") else tuple(parameter.shape)
                if key not in tensors or tuple(tensors[key].shape) != shape:
                    found = list(tensors[key].shape) if key in tensors else "missing"
                    raise ValueError(
                        f"checkpoint: {key} is {found}; it must have shape {list(shape)}"
                    )

    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            put(self.trained[name], value)

    # --- the range test ---

    def find_rate(
        self, seen: Callable[[float, float], None] = lambda rate, loss: None, **options
    ) -> RangeTest:
        """`range_test` on this model and data; afterwards everything is as before. `seen` gets each rate and loss."""
        weights = {name: p.detach().clone() for name, p in self.trained.items()}
        kept, self.optimizer, taken = self.optimizer, self._new_optimizer(), 0

        def step(rate: float) -> float:
            nonlocal taken
            loss, norm = self._gradients(taken)
            taken += 1
            seen(rate, loss)
            if not math.isfinite(norm):
                return math.nan
            self._apply(rate)
            return loss

        try:
            return range_test(step, **options)
        finally:
            self.optimizer.zero_grad()
            self.optimizer = kept
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(weights[name])


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """In which a model of that precision runs."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _megabytes(device: torch.device) -> float:
    """The most memory taken so far: the GPU's, or the process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)
