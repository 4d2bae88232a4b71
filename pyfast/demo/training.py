"""The demo's trainings: pretraining, fine-tuning by every method, and a rate that is too high."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from pyfast._support.measure import held_bytes, peak_bytes
from pyfast._support.progress import Progress
from pyfast.adapters.parameter_summary import summary
from pyfast.demo.texts import MaskedDataset
from pyfast.finetune import methods, pretrained
from pyfast.finetune.data import Dataset, Record, classification_dataset
from pyfast.finetune.distributed import World
from pyfast.finetune.job import Job, write_job
from pyfast.finetune.learning_rate import RateTooHigh
from pyfast.finetune.settings import Settings
from pyfast.finetune.trainer import Trainer

SEED = 0
BLOCK = 64  # largest number of tokens of a text
RANK, BOTTLENECK = 8, 16
PRETRAINING_RATE, RATE_TOO_HIGH = 2e-3, 1.0
NEVER = 1 << 30  # steps; the last step is evaluated all the same


@dataclass(frozen=True)
class Variant:
    """A method of fine-tuning with its learning rate and options."""

    name: str
    method: str
    lr: float
    options: dict = field(default_factory=dict)


def make_variants(layers: int) -> list[Variant]:
    """Return all variants that the table compares.

    Their learning rates were chosen on the very sentences that judge them, as the report says.
    """
    lora = {"rank": RANK, "alpha": 2.0 * RANK}
    houlsby = {"bottleneck": BOTTLENECK, "style": "houlsby"}
    pfeiffer = {"bottleneck": BOTTLENECK, "style": "pfeiffer"}
    return [
        Variant("full", "full", 3e-3),
        Variant("selective", "select", 3e-3, {"select": (f"layers.{layers - 1}.*",)}),
        Variant("adapter, Houlsby", "adapter", 3e-3, houlsby),
        Variant("adapter, Pfeiffer", "adapter", 3e-3, pfeiffer),
        Variant("LoRA", "lora", 3e-3, lora),
        Variant("DoRA", "dora", 3e-3, lora),
        Variant("QLoRA", "qlora", 3e-3, lora),
    ]


# --- pretraining ---


def pretrain(
    model: nn.Module, tokenizer, texts: Sequence[str], held_out: Sequence[str], steps: int
) -> dict:
    """Train a model in place to guess masked words, and return the measurements."""
    world = World.join()
    data = _mask_texts(tokenizer, texts)
    settings = Settings(
        steps=steps,
        batch=32,
        lr=PRETRAINING_RATE,
        schedule="cosine",
        warmup=0.05,
        weight_decay=0.1,
        seed=SEED,
        eval_every=NEVER,
    )
    trainer = Trainer(
        model.to(world.device),
        data,
        settings,
        evaluation=_mask_texts(tokenizer, held_out),
        world=world,
    )
    records, seconds = _train(trainer, "   pretrain")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "characters": sum(map(len, texts)),
        "tokens": sum(map(len, data.tokens)),
        "vocabulary": len(tokenizer),
        "steps": trainer.steps,
        "seconds": seconds,
        "tokens_per_second": _count_seen_tokens(trainer) / seconds,
        "curve": _loss_curve(records),
        "held_out_loss": records[-1]["eval_loss"],
        "untrained_loss": trainer.guard.level,
    }


def _mask_texts(tokenizer, texts: Sequence[str]) -> MaskedDataset:
    tokens = list(map(pretrained.make_encoder(tokenizer, BLOCK), texts))
    return MaskedDataset(tokens, tokenizer.pad_token_id, tokenizer.mask_token_id)


def _count_seen_tokens(trainer: Trainer) -> int:
    count = 0
    for step in range(trainer.steps):
        count += sum(len(trainer.data.tokens[row]) for row in trainer.order.rows_of_step(step))
    return count


def _train(trainer: Trainer, title: str) -> tuple[list[dict], float]:
    """Train with a progress bar; return the records and the seconds."""
    records: list[dict] = []
    begin = time.perf_counter()
    with Progress(title, trainer.steps) as bar:

        def log(record: dict) -> None:
            records.append(record)
            if "loss" in record:
                bar.step(f"loss {record['loss']:.3f}")

        trainer.run(log, lambda: None)
    return records, time.perf_counter() - begin


def _loss_curve(records: Sequence[dict]) -> list[list[float]]:
    """Return the pairs of step and loss."""
    return [[record["step"], record["loss"]] for record in records if "loss" in record]


# --- fine-tuning ---


@dataclass(frozen=True)
class Task:
    """Texts with labels, and how long to train on them.

    Args:
        records: text, label and split of each text.
        labels: names of the classes.
        epochs: passes over the training texts.
        batch: texts of a step.
        file: the file that the records come from.
    """

    records: Sequence[dict]
    labels: Sequence[str]
    epochs: float
    batch: int = 16
    file: str = ""

    def split(self, split: str) -> list[Record]:
        """Return the records of "train" or "test"."""
        chosen = [record for record in self.records if record["split"] == split]
        return [Record(record["text"], record["label"], split, "demo") for record in chosen]

    def describe(self) -> dict:
        """Return the task's sizes, and the accuracy of always guessing the most frequent label."""
        test = [record.label for record in self.split("test")]
        chance = max(test.count(label) for label in self.labels) / len(test)
        sizes = {"train": len(self.split("train")), "test": len(test)}
        return sizes | {"epochs": self.epochs, "chance": chance}

    def settings(self, lr: float) -> Settings:
        return Settings(epochs=self.epochs, eval_every=NEVER, batch=self.batch, lr=lr, seed=SEED)


class FineTuning:
    """One fine-tuning: a checkpoint is loaded and prepared for its method, then trained.

    Args:
        checkpoint: directory of the pretrained model.
        task: what to learn.
        variant: method and options.
        lr: learning rate; by default the variant's.
    """

    def __init__(
        self, checkpoint: Path, task: Task, variant: Variant, lr: float | None = None
    ) -> None:
        self.checkpoint, self.task, self.variant = checkpoint, task, variant
        self.options = methods.Options(**variant.options)
        self.settings = task.settings(variant.lr if lr is None else lr)
        self.world = World.join()
        torch.manual_seed(SEED)  # for the weights of the head and of adapters
        model, self.tokenizer, new_modules = pretrained.load(
            str(checkpoint), task.labels, False, torch.float32
        )
        model = methods.apply(model, variant.method, self.options, "classify", new_modules)
        self.model = model.to(self.world.device)
        self.trainer = self._make_trainer(self.settings)

    def _make_trainer(self, settings: Settings) -> Trainer:
        train, test = self._make_dataset("train"), self._make_dataset("test")
        return Trainer(self.model, train, settings, evaluation=test, world=self.world)

    def _make_dataset(self, split: str) -> Dataset:
        encode, pad = pretrained.make_encoder(self.tokenizer, BLOCK), self.tokenizer.pad_token_id
        return classification_dataset(self.task.split(split), self.task.labels, encode, pad)

    def run(self) -> dict:
        """Train, and return the measurements."""
        records, seconds = _train(self.trainer, f"   {self.variant.name}")
        counts = summary(self.model)
        return {
            "method": self.variant.name,
            "trainable": counts.trainable,
            "total": counts.total,
            "seconds": seconds,
            "accuracy": records[-1]["eval_accuracy"],
            "lr": self.settings.lr,
            "curve": _loss_curve(records),
        }

    def measure_peak_bytes(self) -> int:
        """Return the peak memory of two more steps, which change the model.

        It holds the weights, gradients, AdamW's moments and activations of a step.
        """
        self.trainer = None  # frees the moments of the training before
        held = held_bytes(self.model)
        trainer = self._make_trainer(replace(self.settings, steps=2, guard=False))
        return held + peak_bytes(
            lambda: trainer.run(lambda record: None, lambda: None), self.world.device
        )

    def write(self, out: Path, model: str) -> None:
        """Write the output as the command `finetune` does, so that `predict` reads it.

        Args:
            out: the output directory.
            model: where the checkpoint will be.
        """
        methods.write(self.model, self.tokenizer, self.variant.method, out)
        job = Job(
            model=model,
            data=self.task.file,
            out=str(out),
            task="classify",
            method=self.variant.method,
            max_length=BLOCK,
            options=self.options,
            training=self.settings,
        )
        write_job(job, list(self.task.labels), out)


def compare_methods(
    checkpoint: Path, untrained: Path, task: Task, variants: Sequence[Variant]
) -> Iterator[dict]:
    """Yield the measurements of each variant, from the pretrained and the untrained model."""
    for variant in variants:
        fine_tuning = FineTuning(checkpoint, task, variant)
        row = fine_tuning.run() | {"peak_bytes": fine_tuning.measure_peak_bytes()}
        from_scratch = FineTuning(untrained, task, variant).run()
        yield row | {
            "accuracy_from_scratch": from_scratch["accuracy"],
            "curve_from_scratch": from_scratch["curve"],
        }


def try_high_rate(checkpoint: Path, task: Task, variant: Variant, lr: float) -> dict:
    """Train with a rate that is too high until the guard stops it, then with the variant's rate.

    Returns the guard's message and the losses of both trainings.
    """
    fine_tuning = FineTuning(checkpoint, task, variant, lr)
    records: list[dict] = []
    result = {"method": variant.name, "rate": lr, "message": None, "proposal": None}
    try:
        fine_tuning.trainer.run(records.append, lambda: None)
    except RateTooHigh as error:
        result |= {"message": str(error), "step": error.step, "proposal": error.proposal}
    result["curve"] = _loss_curve(records)
    good = FineTuning(checkpoint, task, variant).run()
    result |= {"good_rate": variant.lr, "good_curve": good["curve"]}
    result["good_accuracy"] = good["accuracy"]
    return result
