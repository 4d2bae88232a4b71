"""The training loop.

All that is random follows from the seed and the step's number, so that training can stop at any
step and continue exactly.

A step's loss is the mean over all its targets (tokens or texts), however these are spread over
forward passes and processes. Without dropout the weights are then the same for every such spread,
up to rounding.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfast.finetune import training_state
from pyfast.finetune.data import IGNORED, Dataset, RowOrder, mix_seed
from pyfast.finetune.distributed import World, full_tensor, unsynchronized
from pyfast.finetune.learning_rate import (
    UNTRAINED_LOSSES,
    Guard,
    RangeTest,
    RateTooHigh,
    range_test,
    schedule_factor,
)
from pyfast.finetune.settings import Settings
from pyfast.finetune.speed import SpeedMeter


class Trainer:
    """A training of those parameters of a model that require gradients.

    Args:
        model: a model that is called as transformers' models are, with `input_ids` and
            `attention_mask`, and returns an object with `logits`.
        data: the training data.
        settings: how to train.
        evaluation: data to evaluate on, or None.
        world: the processes that train together; by default only this one.
        shard: whether to shard the parameters over the processes.

    Raises:
        ValueError: patience is set without evaluation data, or no parameter requires a gradient.
    """

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
                f"patience is {settings.patience}, and there is nothing to evaluate; "
                "give evaluation data"
            )
        self.model, self.data, self.settings, self.evaluation = model, data, settings, evaluation
        self.world = World() if world is None else world
        self.wrapped = self.world.wrap(model, shard)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(
                "model has no parameter that requires a gradient; nothing would be trained"
            )
        self.optimizer = training_state.make_optimizer(self.trained, self.settings)
        self.order = RowOrder(len(data), settings.batch * settings.accumulation, settings.seed)
        epoch = self.order.steps_per_epoch
        self.steps = settings.steps or math.ceil(settings.epochs * epoch)
        self.warmup = round(settings.warmup * (self.steps if settings.warmup < 1 else 1))
        self.eval_every = settings.eval_every or epoch
        self.save_every = settings.save_every or epoch
        self.done = 0  # steps
        self.guard: Guard | None = None
        self._guard_state: dict | None = None  # the guard's after the losses of the steps done
        self.best: dict = {}  # the best evaluation: its step, results, and how many came later
        self.best_weights: dict[str, Tensor] = {}
        self._saved = 0  # the step at which the state was last saved
        self.speed = SpeedMeter(self.world.device)

    # --- the loop ---

    def run(self, log: Callable[[dict], None], save: Callable[[], None]) -> None:
        """Train to the last step, or until patience ends.

        Args:
            log: called with the record of a step.
            save: called when the state is worth saving.

        Raises:
            RateTooHigh: the guard stopped the training; the state is that before the step.
        """
        if self.settings.guard and self.guard is None:
            self.guard = Guard(self._untrained_losses())
        self.speed.restart()
        while self.done < self.steps and not self._is_patience_over():
            record = self._train_step(save)
            is_last = self.done == self.steps
            if self.evaluation is not None and (is_last or self.done % self.eval_every == 0):
                record |= self._evaluate_and_keep_best()
            if is_last or "eval_loss" in record or self.done % self.settings.log_every == 0:
                log(record | self.speed.measure())
        if self.guard is None or self.guard.is_calm():
            self._guard_state = self.guard and self.guard.state()
            save()
        if self.best_weights and self.best["step"] != self.done:
            training_state.write_weights(self.trained, self.best_weights)
            results = {key: self.best[key] for key in ("eval_loss", "eval_accuracy")}
            log({"step": self.done, "epoch": self.epoch, "restored": self.best["step"], **results})

    @property
    def epoch(self) -> float:
        """Epochs that are done, rounded to 4 digits."""
        return round(self.done / self.order.steps_per_epoch, 4)

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        settings = self.settings
        return settings.lr * schedule_factor(settings.schedule, self.done, self.steps, self.warmup)

    def _train_step(self, save: Callable[[], None]) -> dict:
        """Train one step and return its record.

        The state is saved before the step, because only the step's loss shows whether it is good.
        """
        rate = self.rate
        loss, norm = self._compute_gradients(self.done)
        if self.guard is not None:
            self._guard_state = self.guard.state()
            if reason := self.guard.observe(loss, norm):
                raise RateTooHigh(self.done + 1, self.settings.lr, reason)
        is_calm = self.guard is None or self.guard.is_calm()
        if self.done >= self._saved + self.save_every and is_calm:
            self._saved = self.done
            save()
        self._apply_gradients(rate)
        self.done += 1
        return {"step": self.done, "epoch": self.epoch, "loss": loss, "lr": rate, "grad_norm": norm}

    def _compute_gradients(self, step: int) -> tuple[float, float]:
        """Compute the clipped gradients of a step; return its loss and the norm before clipping."""
        rows, batch = self.order.rows_of_step(step), self.settings.batch
        passes = [rows[first : first + batch] for first in range(0, len(rows), batch)]
        targets, total = self.data.count_targets(rows), torch.zeros((), device=self.world.device)
        self.wrapped.train()
        for i, part in enumerate(passes):
            is_last = i == len(passes) - 1
            with nullcontext() if is_last else unsynchronized(self.wrapped):
                loss = self._sum_loss(self.data, part, step, i)[0] / targets
                (loss * self.world.size).backward()  # gradients are means over the processes
            total += loss.detach()
        self.speed.add_tokens(sum(len(self.data.tokens[row]) for row in rows))
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.settings.clip)
        return self.world.sum(total).item(), full_tensor(norm).item()

    def _sum_loss(
        self, data: Dataset, rows: list[int], *numbers: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed loss of this process's rows, their logits and their targets.

        The numbers seed dropout, together with the settings' seed and the process's rank.
        """
        torch.manual_seed(mix_seed(self.settings.seed, *numbers, self.world.rank))
        inputs, targets = data.batch(self.world.local_rows(rows), self.world.device)
        with self.settings.autocast(self.world.device):
            logits = self.wrapped(**inputs).logits
        scores = logits.float().flatten(0, -2)  # [targets, classes or tokens]
        loss = F.cross_entropy(scores, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss, logits, targets

    def _apply_gradients(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _untrained_losses(self) -> list[float]:
        """Return the losses of the first steps' rows before any step."""
        self.wrapped.train()
        losses = []
        for step in range(UNTRAINED_LOSSES):
            rows = self.order.rows_of_step(step)
            loss = self.world.sum(self._sum_loss(self.data, rows, step)[0].detach())
            losses.append(loss.item() / self.data.count_targets(rows))
        return losses

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the mean loss, and the share of targets whose logit is the highest."""
        self.wrapped.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        all_rows = range(len(self.evaluation))
        for first in range(0, len(all_rows), self.settings.batch):
            rows = list(all_rows[first : first + self.settings.batch])
            loss, logits, targets = self._sum_loss(self.evaluation, rows)
            correct = (logits.argmax(-1) == targets).sum()
            sums += torch.stack([loss.double(), correct.double()])
        means = self.world.sum(sums) / self.evaluation.count_targets(all_rows)
        loss, accuracy = means.tolist()
        return {"eval_loss": loss, "eval_accuracy": accuracy}

    def _evaluate_and_keep_best(self) -> dict[str, float]:
        """Evaluate; with patience, keep the weights of the lowest loss."""
        results = self.evaluate()
        if self.settings.patience is None:
            return results
        if not self.best or results["eval_loss"] < self.best["eval_loss"]:
            self.best = {"step": self.done, "later": 0, **results}
            self.best_weights = {
                name: full_tensor(p).cpu().clone() for name, p in self.trained.items()
            }
        else:
            self.best["later"] += 1
        return results

    def _is_patience_over(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.best.get("later", 0) >= patience

    # --- the state ---

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Return all that training continues from: tensors, and fields for JSON.

        Every process has to call it.
        """
        tensors = training_state.collect_tensors(self.trained, self.best_weights, self.optimizer)
        return tensors, {"step": self.done, "best": self.best, "guard": self._guard_state}

    def load_state(
        self, tensors: dict[str, Tensor], fields: dict, *, new_rate: bool = False
    ) -> None:
        """Continue from a state that `state` returned.

        Args:
            tensors: the state's tensors.
            fields: the state's fields.
            new_rate: whether the learning rate is another one. The guard then forgets the losses
                of the steps, but not those of the untrained model.

        Raises:
            ValueError: the tensors are not those of this model.
        """
        self.best_weights = training_state.restore_tensors(self.trained, self.optimizer, tensors)
        self.done = self._saved = fields["step"]
        self.best, self.guard, self._guard_state = fields["best"], None, fields["guard"]
        if fields["guard"] and self.settings.guard:
            self.guard = Guard.from_state(fields["guard"])
            if new_rate:
                self.guard.losses = []

    # --- the range test ---

    def find_rate(
        self, report: Callable[[float, float], None] = lambda rate, loss: None, **options
    ) -> RangeTest:
        """Run `range_test` on this model and data; afterwards all is as before.

        Args:
            report: called with each rate and its loss.
            options: of `range_test`.
        """
        weights = {name: p.detach().clone() for name, p in self.trained.items()}
        optimizer, self.optimizer, step = (
            self.optimizer,
            training_state.make_optimizer(self.trained, self.settings),
            0,
        )

        def train_step(rate: float) -> float:
            nonlocal step
            loss, norm = self._compute_gradients(step)
            step += 1
            report(rate, loss)
            if not math.isfinite(norm):
                return math.nan
            self._apply_gradients(rate)
            return loss

        try:
            return range_test(train_step, **options)
        finally:
            self.optimizer.zero_grad()
            self.optimizer = optimizer
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(weights[name])
